"""Documents that a function of the user's own yields, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwright.train import own_files, own_parts
from shardwright.train.config.data import PythonData
from shardwright.train.data.sources import filtering
from shardwright.train.data.sources.documents_process import KEY
from shardwright.train.data.sources.files.pieces import Text, pieces
from shardwright.train.data.sources.source import Reading, Source, code
from shardwright.train.errors import UserError
from shardwright.train.process.frames import read
from shardwright.train.program import package_environment


class PythonSource(Source[PythonData]):
    """A document is what the function yields."""

    def located(self) -> PythonData:
        return self.data.model_copy(update={"source": own_parts.located(KEY, self.data.source)})

    def check(self) -> None:
        own_parts.check(KEY, self.data.source)

    def texts(self, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
        wanted = filtering.takes_fields(self.data.filter)
        yield (
            piece
            for text, fields in documents(self.data)
            for piece in pieces(text, fields if wanted else None)
        )

    def identity(self, cache_dir: Path) -> Mapping[str, Any]:
        asked = {name: getattr(self.data, name) for name in ("options", "version", "text_field")}
        return {"source": own_files.fingerprint(KEY, self.data.source), **asked}

    def title(self) -> str:
        return f"what {code(own_parts.part(KEY, self.data.source).name)} yields"

    def details(self, provenance: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        yield "Version", self.data.version or None


def documents(data: PythonData) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield text and other fields of each document. Raises UserError, which says what is wrong.

    The process ends with whoever reads from it, and with what reads no further.
    """
    argv = [sys.executable, "-m", "shardwright.train.data.sources.documents_process"]
    asked = {"source": data.source, "options": data.options, "text_field": data.text_field}
    with subprocess.Popen(
        [*argv, str(os.getpid())],
        env={**os.environ, **package_environment(os.environ)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        number = 0
        try:
            child.stdin.write(json.dumps(asked).encode())
            child.stdin.close()
            while batch := _next(data, child, number):
                yield from batch
                number += len(batch)
        finally:
            child.kill()


def _next(
    data: PythonData, child: subprocess.Popen[bytes], number: int
) -> list[tuple[str, dict[str, Any]]]:
    try:
        found = read(child.stdout)
    except EOFError:
        code_ = child.wait()
        how = f"was killed by {signal.Signals(-code_).name}" if code_ < 0 else "has ended"
        found = f"its process {how} after {number:,} documents"
    if isinstance(found, str):
        raise UserError(f"{KEY}={data.source}: {found}")
    batch: list[tuple[str, dict[str, Any]]] = found
    return batch
