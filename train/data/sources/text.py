"""Local files, each path a part of its own with its weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwright.train.config.data import TextData
from shardwright.train.data.sources import files
from shardwright.train.data.sources.files import Text
from shardwright.train.data.sources.source import Reading, Source, code
from shardwright.train.paths import absolute


class LocalFiles(Source[TextData]):
    """A document is a file or a row; under ``line_by_line`` those of a .txt are its lines."""

    def located(self) -> TextData:
        paths = tuple(absolute(path) for path in self.data.paths)
        return self.data.model_copy(update={"paths": paths})

    def check(self) -> None:
        files.check_overlap(self.data.paths)
        for pattern in self.data.paths:
            files.check_files(pattern, self.data.text_field)

    def texts(self, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
        yield from (self._texts(pattern, reading) for pattern in self.data.paths)

    def identity(self, cache_dir: Path) -> Mapping[str, Any]:
        paths = [[files.identity(p) for p in files.expand(pattern)] for pattern in self.data.paths]
        return {"sources": paths, "text_field": self.data.text_field}

    @property
    def weights(self) -> tuple[float, ...]:
        return self.data.weights or (1.0,) * len(self.data.paths)

    @property
    def parts(self) -> tuple[str, ...]:
        paths = self.data.paths
        return tuple(f"data.paths: {path}" for path in paths) if len(paths) > 1 else ()

    def title(self) -> str:
        return "local files, " + ", ".join(code(Path(path).name) for path in self.data.paths)

    def _texts(self, pattern: str, reading: Reading) -> Iterator[Text]:
        for path in files.expand(pattern):
            is_empty = True
            for piece in files.read_file(path, self.data.text_field, self.data.line_by_line):
                is_empty = is_empty and not piece.text.strip()
                yield piece
            if is_empty and not files.is_glob(pattern):
                raise files.is_empty(path)
            reading.empty_files += is_empty
