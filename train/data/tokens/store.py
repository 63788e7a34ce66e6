"""Token stores: flat arrays on disk, appended to once and memory-mapped ever after."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardwright.train.data.tokens.cache import new_hash

COPIED_BYTES = 2**22


class TokenStore:
    """The tokens of one source's training or held-out documents, memory-mapped.

    ``tokens``: ids, uint16 or uint32, shape (n,). ``word_starts``: uint8, shape (n,), 1 where a
    token begins a word, or None where they were not wanted. ``line_ends``: int64, shape (lines,),
    the index after each line's last token, or None where documents are packed. ``document_ends``:
    the same of documents, or None where it was not wanted or lines are. Beside these there may be
    the bytes that the text of each document, or line, has: int64.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name

    @cached_property
    def tokens(self) -> NDArray[Any]:
        path = next(p for p in _token_paths(self.directory, self.name).values() if p.exists())
        return mapped(path, np.dtype(path.suffix[1:]))

    @cached_property
    def word_starts(self) -> NDArray[np.uint8] | None:
        path = self.directory / f"{self.name}.words"
        return mapped(path, np.dtype(np.uint8)) if path.exists() else None

    @cached_property
    def line_ends(self) -> NDArray[np.int64] | None:
        path = self.directory / f"{self.name}.lines"
        return mapped(path, np.dtype(np.int64)) if path.exists() else None

    @cached_property
    def document_ends(self) -> NDArray[np.int64] | None:
        path = self.directory / f"{self.name}.documents"
        return mapped(path, np.dtype(np.int64)) if path.exists() else None

    @cached_property
    def text_bytes(self) -> int | None:
        """Bytes of all texts, as UTF-8; None where that was not kept."""
        return None if (sizes := self.text_sizes) is None else int(sizes.sum())

    @cached_property
    def text_sizes(self) -> NDArray[np.int64] | None:
        path = self.directory / f"{self.name}.bytes"
        return mapped(path, np.dtype(np.int64)) if path.exists() else None

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path, str]]:
        # A worker process maps the files anew; pickled arrays would travel whole.
        return TokenStore, (self.directory, self.name)


class StoreWriter:
    """Appends to a store's files; a context manager."""

    def __init__(
        self,
        directory: Path,
        name: str,
        vocabulary_size: int,
        words: bool,
        *,
        lines: bool,
        documents: bool = False,
        texts: bool = False,
    ) -> None:
        """``texts`` keeps how many bytes each document's text has, as `add_text` tells them."""
        assert not (lines and documents), "a line is a document of its own"
        self.dtype = np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)
        self.token_count = 0
        self._closing = ExitStack()

        def create(path: Path) -> Any:
            return self._closing.enter_context(path.open("wb"))

        self._tokens = create(_token_paths(directory, name)[self.dtype.name])
        self._words = create(directory / f"{name}.words") if words else None
        self._ends_suffix = "lines" if lines else "documents" if documents else None
        ends = directory / f"{name}.{self._ends_suffix}"
        self._ends = create(ends) if self._ends_suffix else None
        self._bytes = create(directory / f"{name}.bytes") if texts else None
        self._begun_bytes = 0
        """Of a text whose end has not come yet."""

    def append(self, ids: ArrayLike, word_starts: ArrayLike, ends: ArrayLike) -> None:
        """Append tokens; ``ends``, of lines or documents, are counted from the first of these."""
        tokens = np.asarray(ids, dtype=self.dtype)
        self._tokens.write(tokens.data)
        if self._words is not None:
            words = np.asarray(word_starts, dtype=np.uint8)
            assert len(words) == len(tokens)
            self._words.write(words.data)
        if self._ends is not None:
            self._ends.write((np.asarray(ends, dtype=np.int64) + self.token_count).data)
        self.token_count += len(tokens)

    def add_text(self, text: str, *, ends: bool) -> None:
        """Count a piece of a document's text; it ``ends`` there, or the next piece is of it too."""
        assert self._bytes is not None
        self._begun_bytes += len(text.encode("utf-8", "surrogatepass"))
        if ends:
            self._bytes.write(np.int64(self._begun_bytes).tobytes())
            self._begun_bytes = 0

    def add_texts(self, sizes: NDArray[np.int64]) -> None:
        """Count whole texts by their bytes."""
        assert self._bytes is not None
        self._bytes.write(np.ascontiguousarray(sizes).data)

    def extend(self, directory: Path, name: str) -> dict[str, str]:
        """Append all of another store, of the same kind; return the hash of each of its files."""
        of_ends = np.dtype(np.int64)
        first = self.token_count
        hashes = {}
        for file, suffix, shift in (
            (self._tokens, self.dtype.name, 0),
            (self._words, "words", 0),
            (self._ends, self._ends_suffix, first),
            (self._bytes, "bytes", 0),
        ):
            if file is None:
                continue
            path = directory / f"{name}.{suffix}"
            hasher = new_hash()
            with path.open("rb") as source:
                while block := source.read(COPIED_BYTES):
                    hasher.update(block)
                    file.write((np.frombuffer(block, of_ends) + shift).data if shift else block)
                if file is self._tokens:
                    self.token_count += source.tell() // self.dtype.itemsize
            hashes[path.name] = hasher.hexdigest()
        return hashes

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()


def _token_paths(directory: Path, name: str) -> dict[str, Path]:
    return {dtype: directory / f"{name}.{dtype}" for dtype in ("uint16", "uint32")}


def mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the numbers of a file, which are read when they are looked at."""
    if path.stat().st_size == 0:
        # An empty file cannot be mapped.
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
