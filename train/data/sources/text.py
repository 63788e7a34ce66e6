"""Local files, each path a part of its own with its weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwright.train.config.data import TextData
from shardwright.train.data.sources import filtering
from shardwright.train.data.sources.files.errors import is_empty
from shardwright.train.data.sources.files.file import Remote, is_url, name_of
from shardwright.train.data.sources.files.paths import check_overlap, expand, file_at, is_glob
from shardwright.train.data.sources.files.pieces import Text
from shardwright.train.data.sources.files.ranges import Range, divided
from shardwright.train.data.sources.files.reading import check_files, identity_of_text, read_file
from shardwright.train.data.sources.files.skipping import Skipping, note
from shardwright.train.data.sources.shards import Shard, Span, joined, size_of, size_wanted
from shardwright.train.data.sources.source import Reading, Source, code
from shardwright.train.paths import absolute


class LocalFiles(Source[TextData]):
    """A document is a file or a row; under ``line_by_line`` those of a .txt are its lines."""

    def located(self) -> TextData:
        paths = tuple(path if is_url(path) else absolute(path) for path in self.data.paths)
        return self.data.model_copy(update={"paths": paths})

    def check(self) -> None:
        check_overlap(self.data.paths)
        for pattern in self.data.paths:
            check_files(pattern, self.data.text_field, self._skips(pattern))

    def texts(self, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
        yield from (self._texts(pattern, reading) for pattern in self.data.paths)

    def shards(self, cache_dir: Path) -> list[Shard]:
        files = [(part, path) for part, p in enumerate(self.data.paths) for path in expand(p)]
        sizes = [size_of(path) for _, path in files]
        most_bytes = size_wanted(sum(sizes))
        spans: list[Span] = []
        for (part, path), size in zip(files, sizes, strict=True):
            whole = Span(part, str(path), size)
            ranges = divided(path, size, self.data.line_by_line, most_bytes)
            spans += [Span(part, str(path), *one) for one in ranges] or [whole]
        return joined(spans, most_bytes)

    def read(
        self, shard: Shard, cache_dir: Path, reading: Reading
    ) -> Iterator[tuple[int, Iterable[Text]]]:
        for span in shard.spans:
            skips = self._skips(self.data.paths[span.part])
            yield span.part, self._file(file_at(span.path), skips, reading, span.within)

    def identity(self, cache_dir: Path) -> Mapping[str, Any]:
        paths = [[identity_of_text(p) for p in expand(pattern)] for pattern in self.data.paths]
        # What is new is not in there as long as nobody uses it: runs begun before know the rest.
        used = {
            name: value
            for name in ("on_bad_document", "max_document_bytes")
            if (value := getattr(self.data, name)) not in (None, "auto")
        }
        return {"sources": paths, "text_field": self.data.text_field, **used}

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
        return "local files, " + ", ".join(code(name_of(path)) for path in self.data.paths)

    def _texts(self, pattern: str, reading: Reading) -> Iterator[Text]:
        skips = self._skips(pattern)
        for path in expand(pattern):
            yield from self._file(path, skips, reading)

    def _file(
        self, path: Path | Remote, skips: bool, reading: Reading, within: Range | None = None
    ) -> Iterator[Text]:
        """Yield the documents of a file or of a range of it, the first of which tells if all are
        empty."""
        settings = self.data.text_field, self.data.line_by_line
        bad = Skipping(reading.skipped if skips else None)
        has_text = within is not None and within.begin > 0
        longest = self.data.max_document_bytes
        wanted = filtering.takes_fields(self.data.filter)
        for piece in read_file(
            path, *settings, within, bad=bad, most_bytes=longest, with_fields=wanted
        ):
            has_text = has_text or bool(piece.text.strip())
            yield piece
        if within is not None and not has_text and not bad.count:
            elsewhere = Skipping({} if skips else None)
            all_of_it = read_file(path, *settings, bad=elsewhere)
            has_text = any(piece.text.strip() for piece in all_of_it) or bool(elsewhere.count)
        if has_text or bad.count:
            return
        if not skips:
            raise is_empty(path)
        reading.empty_files += 1
        note(reading.skipped, "empty files", path)

    def _skips(self, pattern: str) -> bool:
        """Return whether what cannot be read of a path's files is left out."""
        wanted = self.data.on_bad_document
        return is_glob(pattern) if wanted == "auto" else wanted == "skip"
