"""The Python sources of the interpreter's own standard library."""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwright.train.config.data import StdlibData
from shardwright.train.data.sources.files.pieces import Text, pieces
from shardwright.train.data.sources.files.reading import identity
from shardwright.train.data.sources.shards import Shard, Span, joined, size_of, size_wanted
from shardwright.train.data.sources.source import Reading, Source
from shardwright.train.errors import UserError

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Stdlib(Source[StdlibData]):
    """A document is a module."""

    def check(self) -> None:
        if not next(_files(), None):
            raise UserError(
                f"data=stdlib: there are no Python sources in {sysconfig.get_path('stdlib')}; "
                "choose data=text with files of your own"
            )

    def texts(self, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
        yield _documents(_files())

    def shards(self, cache_dir: Path) -> list[Shard]:
        spans = [Span(0, str(path), size_of(path)) for path in _files()]
        return joined(spans, size_wanted(sum(span.size_bytes for span in spans)))

    def read(
        self, shard: Shard, cache_dir: Path, reading: Reading
    ) -> Iterator[tuple[int, Iterable[Text]]]:
        yield 0, _documents(Path(span.path) for span in shard.spans)

    def identity(self, cache_dir: Path) -> Mapping[str, Any]:
        return {"sources": [identity(path) for path in _files()]}

    def title(self) -> str:
        return "the Python sources of the interpreter's own standard library"

    def details(self, provenance: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        yield "Python version", provenance.get("python")

    @property
    def licence(self) -> str:
        return "Python Software Foundation License"

    @property
    def languages(self) -> list[str]:
        return ["code", "en"]

    def limits(self) -> str:
        return (
            "It knows Python as the standard library writes it, and English as its comments do. "
            "What it writes looks like code, and may not run, be correct or be safe."
        )


def _files() -> Iterator[Path]:
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(name for name in folders if name not in NOT_LIBRARY)
        paths = (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
        yield from (path for path in paths if path.is_file())


def _documents(paths: Iterable[Path]) -> Iterator[Text]:
    for path in paths:
        try:
            with tokenize.open(path) as file:
                source = file.read()
        except (SyntaxError, UnicodeDecodeError):
            # Some distributions ship fixtures in odd encodings among the sources.
            continue
        yield from pieces(source)
