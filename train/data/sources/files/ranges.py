"""Ranges of large files that are read independently of one another."""

from __future__ import annotations

import codecs
import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple

from shardwright.train.data.sources.files.file import File, Remote
from shardwright.train.data.sources.files.pieces import PIECE_BYTES

_LINE_END = re.compile(rb"[\r\n]")


class Range(NamedTuple):
    """The lines that begin in a range of a file's bytes; of a .parquet, a range of row groups."""

    begin: int
    end: int


def divided(
    path: Path | Remote, size_bytes: int, by_line: bool, most_bytes: int
) -> list[tuple[int, Range]]:
    """Return the ranges that a file is read in, each behind its size in bytes.

    Nothing where it is read whole: as a small one is, and one in which nobody can begin midway.
    """
    if size_bytes <= most_bytes:
        return []
    suffix = PurePath(path.name).suffix
    if suffix == ".parquet":
        return _of_row_groups(path, most_bytes)
    if suffix == ".jsonl" or (suffix == ".txt" and by_line):
        # Of nearly the same size, so that none is a small rest.
        count = -(-size_bytes // most_bytes)
        bounds = [size_bytes * i // count for i in range(count + 1)]
        found = [Range(*pair) for pair in itertools.pairwise(bounds)]
        return [(one.end - one.begin, one) for one in found]
    return []


def _of_row_groups(path: Path | Remote, most_bytes: int) -> list[tuple[int, Range]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with contextlib.ExitStack() as opened:
            source: Any = path if isinstance(path, Path) else opened.enter_context(path.open("rb"))
            file = opened.enter_context(pyarrow.parquet.ParquetFile(source))
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            sizes = [
                sum(group.column(j).total_compressed_size for j in range(group.num_columns))
                for group in groups
            ]
    except (OSError, pyarrow.ArrowException):
        return []  # whoever reads it says what is wrong with it
    found: list[tuple[int, Range]] = []
    begin = size = 0
    for end, more in enumerate(sizes, 1):
        size += more
        if size >= most_bytes or end == len(sizes):
            found.append((size, Range(begin, end)))
            begin, size = end, 0
    return found


def chunks(file: IO[bytes], within: Range) -> Iterator[tuple[int, bytes, bool]]:
    """Yield where a chunk begins, the chunk, and whether it is the last of the range's lines.

    But for the first and the last one they are those in which the whole file is read: where a long
    line is cut into pieces depends on them.
    """
    offset = _first_line(file, within)
    if offset is None:
        return
    file.seek(offset)
    while chunk := file.read(PIECE_BYTES - offset % PIECE_BYTES):
        # A line that begins at the end of the range is the next one's.
        found = _LINE_END.search(chunk, max(0, within.end - 1 - offset))
        own = chunk if found is None else chunk[: found.end()]
        if found is not None and _is_followed(chunk, found.end()):
            yield offset, own, True
            return
        yield offset, own, False
        offset += len(own)
        if found is not None:
            break
    yield offset, b"", True


def _is_followed(chunk: bytes, end: int) -> bool:
    """Return whether a chunk has a whole character behind a line's end.

    Who reads on does not see a "\\r" as the end of a line before what follows is there.
    """
    following = chunk[end : end + 4]
    return bool(codecs.getincrementaldecoder("utf-8")("replace").decode(following))


def _first_line(file: IO[bytes], within: Range) -> int | None:
    """Return where the first line begins that begins within a range; None where none does."""
    if within.begin == 0:
        return 0
    offset = within.begin - 1
    file.seek(offset)
    while offset < within.end and (chunk := file.read(PIECE_BYTES)):
        if found := _LINE_END.search(chunk):
            begin = offset + found.end()
            if found[0] == b"\r":
                file.seek(begin)
                begin += file.read(1) == b"\n"
            return begin if begin < within.end else None
        offset += len(chunk)
    return None


class LineNumber(int):
    """The number of a line within a range, written as that within the file.

    The lines before it are counted where it is written, which is in a message alone.
    """

    path: Path | Remote
    within: Range

    def __str__(self) -> str:
        return str(int(self) + lines_before(self.path, self.within))

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(int(self) + lines_before(self.path, self.within), spec)


def line_number(number: int, path: File, within: Range | None) -> int:
    """Return the number of a line of a file, or of a range of it."""
    if within is None or within.begin == 0:
        return number
    assert isinstance(path, Path | Remote), "a member of an archive has no ranges"
    found = LineNumber(number)
    found.path, found.within = path, within
    return found


def lines_before(path: Path | Remote, within: Range) -> int:
    """Return how many lines end before the first one of a range."""
    with path.open("rb") as file:
        left = _first_line(file, within) or within.begin
        file.seek(0)
        count, last = 0, b""
        while left and (chunk := file.read(min(left, PIECE_BYTES))):
            count += chunk.count(b"\n") + chunk.count(b"\r") - (last + chunk).count(b"\r\n")
            left -= len(chunk)
            last = chunk[-1:]
    return count
