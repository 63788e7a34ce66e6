"""Which documents a run reads: config -> stream of text, with the held-out ones marked."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
import tokenize
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from train.config import DataConfig, HubData, KantData, TextData
from train.data.sources import download, files, hub
from train.data.sources.files import Text
from train.errors import UserError

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Piece(NamedTuple):
    """A document of a source, or one piece of a long one; its pieces follow one another."""

    text: str
    begins: bool
    ends: bool
    source: int
    held_out: bool


def check_corpus(data: DataConfig) -> None:
    """Raise UserError for what can be seen to be wrong with a corpus without reading it whole.

    Reads the beginning of each local file; downloads nothing.
    """
    if data.kind == "stdlib" and not next(_stdlib_files(), None):
        raise UserError(
            f"data=stdlib: there are no Python sources in {sysconfig.get_path('stdlib')}; "
            "choose data=text with files of your own"
        )
    if data.kind == "text":
        files.check_overlap(data.paths)
        for pattern in data.paths:
            files.check_files(pattern, data.text_field)
    if data.kind == "kant":
        for url in data.urls:
            if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
                raise UserError(
                    f"data.urls: {url} is no http or https address; correct it, or read local "
                    "files with data=text"
                )


@dataclass
class Reading:
    """What was met while a corpus was read, and is no document."""

    empty_files: int = 0
    """Matched by a glob and passed over."""


def read_corpus(
    data: DataConfig, cache_dir: Path, reading: Reading | None = None
) -> Iterator[Piece]:
    """Yield the corpus in its fixed order, one piece in memory at a time.

    A document is a file, a row, or for ``kant`` a paragraph; under ``line_by_line`` the documents
    of a .txt and of a book are its lines. Those without any text are left out. ``cache_dir`` keeps
    downloads, ``reading`` is filled in on the way. Raises UserError at what cannot be read.
    """
    documents = 0
    held_out = False
    for source, texts in enumerate(_sources(data, cache_dir, reading or Reading())):
        for text, begins, ends in texts:
            if begins:
                if ends and not text.strip():
                    continue
                if documents == data.max_documents:
                    return
                documents += 1
                held_out = is_held_out(text, data.eval_fraction)
            yield Piece(text, begins, ends, source, held_out)


def is_held_out(text: str, fraction: float) -> bool:
    """Decide by a hash of its text (of a long document: of its beginning) where a document goes.

    So the same text goes the same way wherever it turns up, and a grown corpus keeps its split.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out")
    return int.from_bytes(digest.digest(), "big") < fraction * 2**64


def source_weights(data: DataConfig) -> tuple[float, ...]:
    """Return for each source how often its samples are seen in one epoch."""
    if data.kind != "text":
        return (1.0,)
    return data.weights or (1.0,) * len(data.paths)


def corpus_identity(data: DataConfig, cache_dir: Path) -> dict[str, Any]:
    """Return what changes when any document of the corpus, or their order, does."""
    settings = {
        "kind": data.kind,
        "line_by_line": data.line_by_line,
        "max_documents": data.max_documents,
        "eval_fraction": data.eval_fraction,
    }
    if data.kind == "hub":
        return settings | {"sources": hub.identity(data)}
    if data.kind == "kant":
        return settings | {"sources": [files.identity(p) for p in _books(data, cache_dir)]}
    if data.kind == "text":
        paths = [[files.identity(p) for p in files.expand(pattern)] for pattern in data.paths]
        return settings | {"sources": paths, "text_field": data.text_field}
    return settings | {"sources": [files.identity(path) for path in _stdlib_files()]}


def _sources(data: DataConfig, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
    match data:
        case TextData():
            yield from (_local_files(data, pattern, reading) for pattern in data.paths)
        case HubData():
            yield (piece for row in hub.rows(data) for piece in files.pieces(row))
        case KantData():
            cut = lines if data.line_by_line else paragraphs
            yield (
                piece
                for book in _books(data, cache_dir)
                for text in cut(book)
                for piece in files.pieces(text)
            )
        case _:
            yield (piece for source in _stdlib_sources() for piece in files.pieces(source))


def _local_files(data: TextData, pattern: str, reading: Reading) -> Iterator[Text]:
    for path in files.expand(pattern):
        is_empty = True
        for piece in files.read_file(path, data.text_field, data.line_by_line):
            is_empty = is_empty and not piece.text.strip()
            yield piece
        if is_empty and not files.is_glob(pattern):
            raise files.is_empty(path)
        reading.empty_files += is_empty


def _stdlib_files() -> Iterator[Path]:
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(name for name in folders if name not in NOT_LIBRARY)
        paths = (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
        yield from (path for path in paths if path.is_file())


def _stdlib_sources() -> Iterator[str]:
    for path in _stdlib_files():
        try:
            with tokenize.open(path) as file:
                source = file.read()
        except (SyntaxError, UnicodeDecodeError):
            # Some distributions ship fixtures in odd encodings among the sources.
            continue
        yield source


def _books(data: KantData, cache_dir: Path) -> list[Path]:
    return [download.fetch(url, cache_dir) for url in data.urls]


def paragraphs(book: Path) -> Iterator[str]:
    """Yield a plain-text book's paragraphs, unwrapped, without Project Gutenberg's frame."""
    for paragraph in re.split(r"\n\s*\n", _unframed(book)):
        yield " ".join(paragraph.split())


def lines(book: Path) -> Iterator[str]:
    """Yield a plain-text book's lines as they were printed, without Project Gutenberg's frame."""
    yield from _unframed(book).split("\n")


def _unframed(book: Path) -> str:
    try:
        text = book.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.urls: what was downloaded to {book} is not UTF-8 at byte {error.start}; "
            "give the address of a UTF-8 text"
        ) from None
    if start := re.search(r"^\*\*\* ?START OF .*$", text, re.MULTILINE):
        text = text[start.end() :]
    if end := re.search(r"^\*\*\* ?END OF .*$", text, re.MULTILINE):
        text = text[: end.start()]
    return text
