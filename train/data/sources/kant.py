"""Books by URL as plain text, without Project Gutenberg's frame."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwright.train.config.data import KantData
from shardwright.train.data.sources.files.pieces import Text, pieces
from shardwright.train.data.sources.files.reading import identity
from shardwright.train.data.sources.source import Reading, Source
from shardwright.train.errors import UserError


class Books(Source[KantData]):
    """A document is a paragraph; under ``line_by_line`` it is a line as printed."""

    def check(self) -> None:
        for url in self.data.urls:
            if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
                raise UserError(
                    f"data.urls: {url} is not an http or https address; correct it, or read "
                    "local files with data=text"
                )

    def texts(self, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
        cut = lines if self.data.line_by_line else paragraphs
        yield (
            piece for book in self._books(cache_dir) for text in cut(book) for piece in pieces(text)
        )

    def identity(self, cache_dir: Path) -> Mapping[str, Any]:
        return {"sources": [identity(path) for path in self._books(cache_dir)]}

    def title(self) -> str:
        return "books by Immanuel Kant"

    def details(self, provenance: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        urls = self.data.urls
        yield "Sources", ", ".join(urls if self._is_public else [Path(u).name for u in urls])

    @property
    def licence(self) -> str | None:
        if not self._is_public:
            return None
        return "public domain in the USA, as Project Gutenberg says of its books"

    @property
    def languages(self) -> list[str]:
        return ["en"]

    def limits(self) -> str:
        return (
            "It knows the English of a few translations of Immanuel Kant and nothing else. It "
            "repeats the views of its author and his time, those on people included, "
            "uncritically."
        )

    @property
    def _is_public(self) -> bool:
        return all("gutenberg.org/" in url for url in self.data.urls)

    def _books(self, cache_dir: Path) -> list[Path]:
        # Brings HTTP, which a launcher does not need.
        from shardwright.train.data.sources import download

        return [download.fetch(url, cache_dir) for url in self.data.urls]


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
