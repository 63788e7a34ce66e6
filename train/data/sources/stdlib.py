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
        yield (piece for source in _sources() for piece in pieces(source))

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


def _sources() -> Iterator[str]:
    for path in _files():
        try:
            with tokenize.open(path) as file:
                source = file.read()
        except (SyntaxError, UnicodeDecodeError):
            # Some distributions ship fixtures in odd encodings among the sources.
            continue
        yield source
