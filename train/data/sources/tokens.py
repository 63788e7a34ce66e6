"""Token ids that other programs have stored, each path a part of its own with its weight."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train.config.data import TokensData
from shardwright.train.data.sources.files.errors import is_empty, is_missing
from shardwright.train.data.sources.files.file import is_url, name_of
from shardwright.train.data.sources.files.formats import TABLES, is_note
from shardwright.train.data.sources.files.paths import check_overlap, expand
from shardwright.train.data.sources.files.pieces import Text
from shardwright.train.data.sources.files.reading import identity
from shardwright.train.data.sources.shards import size_of
from shardwright.train.data.sources.source import Reading, Source, code
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute

if TYPE_CHECKING:
    from shardwright.train.data.sources.stores.ids import Ids

ENDINGS = (".bin", ".npy", ".ds", *TABLES)
COMPANIONS = (".idx", ".index", ".metadata", ".loss")
"""What stands beside a store, and is read with it or not at all."""


class TokenFiles(Source[TokensData]):
    """A document is what a store says that it is, or what ends with the tokenizer's own end."""

    def located(self) -> TokensData:
        paths = tuple(absolute(path) for path in self.data.paths)
        return self.data.model_copy(update={"paths": paths})

    def check(self) -> None:
        for pattern in self.data.paths:
            if is_url(pattern):
                raise UserError(
                    f"data.paths: {pattern}: stores of tokens are mapped into memory; copy it here"
                )
        check_overlap(self.data.paths, self._files)
        for pattern in self.data.paths:
            for path in self._files(pattern):
                if not path.exists():
                    raise is_missing(path)
                if next(self._documents(path, None), None) is None:
                    raise is_empty(path)

    def texts(self, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
        raise UserError(
            "data=tokens has no text to train a tokenizer on; set tokenizer=pretrained "
            "tokenizer.name=... to the tokenizer that the ids are of"
        )

    def ids(self, separator: int | None) -> Iterator[Iterable[tuple[str, Ids]]]:
        yield from (
            (
                (str(path), ids)
                for path in self._files(pattern)
                for ids in self._documents(path, separator)
            )
            for pattern in self.data.paths
        )

    def stored_bytes(self) -> int:
        return sum(size_of(path) for pattern in self.data.paths for path in self._files(pattern))

    def identity(self, cache_dir: Path) -> Mapping[str, Any]:
        paths = [
            [identity(file) for path in self._files(pattern) for file in _with_companions(path)]
            for pattern in self.data.paths
        ]
        return {"sources": paths, "dtype": self.data.dtype, "ids_field": self.data.ids_field}

    @property
    def weights(self) -> tuple[float, ...]:
        return self.data.weights or (1.0,) * len(self.data.paths)

    @property
    def names(self) -> tuple[str, ...]:
        return self.data.names_of_paths

    @property
    def parts(self) -> tuple[str, ...]:
        paths = self.data.paths
        return tuple(f"data.paths: {path}" for path in paths) if len(paths) > 1 else ()

    def title(self) -> str:
        names = ", ".join(code(name_of(path)) for path in self.data.paths)
        return f"tokens in local files, {names}"

    def _files(self, pattern: str) -> list[Path]:
        folder = Path(os.path.expanduser(pattern))
        by_name = folder.is_dir()
        if by_name:
            found = sorted(path for path in folder.rglob("*") if path.is_file())
        else:
            found = [Path(str(path)) for path in expand(pattern)]
        # Megatron's are named by either of their two files, or by both.
        found = list(dict.fromkeys(map(_store_of, found)))
        files = [path for path in found if path.suffix in ENDINGS and not is_note(path.name)]
        if by_name and not files:
            raise UserError(
                f"data.paths: {pattern} is a directory with no file that ends in one of "
                f"{', '.join(ENDINGS)}; give another"
            )
        wrong = [path for path in found if path.suffix not in (*ENDINGS, *COMPANIONS)]
        if wrong and not by_name:
            if not wrong[0].exists():
                raise is_missing(wrong[0])
            raise UserError(
                f"data.paths: {wrong[0]} does not end in one of {', '.join(ENDINGS)}; give a store "
                "of token ids, or read texts with data=text"
            )
        return files

    def _documents(self, path: Path, separator: int | None) -> Iterator[Ids]:
        # Brings NumPy, which a launcher does not need.
        from shardwright.train.data.sources.stores import arrays, id_tables

        of_array = {
            ".npy": arrays.documents_of_npy,
            ".bin": arrays.documents_of_raw,
            ".ds": arrays.documents_of_datatrove,
        }
        if path.suffix in TABLES:
            return id_tables.documents(path, self.data.ids_field)
        return of_array[path.suffix](path, self.data.dtype, separator)


def _store_of(path: Path) -> Path:
    return path.with_suffix(".bin") if path.suffix == ".idx" else path


def _with_companions(path: Path) -> Iterator[Path]:
    yield path
    for beside in (path.with_suffix(".idx"), Path(f"{path}.index")):
        if path.suffix in (".bin", ".ds") and beside.exists():
            yield beside
