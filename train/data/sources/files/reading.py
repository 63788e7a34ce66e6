"""What a file holds: checked before a run starts, read, and told apart from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from shardwright.train.data.sources.files import delimited, json_objects, tables
from shardwright.train.data.sources.files.archives import members
from shardwright.train.data.sources.files.decoding import (
    decoded,
    lines_without_bad_bytes,
    until_bad_bytes,
)
from shardwright.train.data.sources.files.errors import (
    BadDocument,
    Unreachable,
    is_directory,
    is_empty,
    is_missing,
    unreadable,
)
from shardwright.train.data.sources.files.file import File, Member, Remote, is_url
from shardwright.train.data.sources.files.formats import (
    KNOWN,
    TABLES,
    compression,
    ending,
    is_known,
)
from shardwright.train.data.sources.files.paths import expand, is_glob
from shardwright.train.data.sources.files.pieces import Row, Text, in_lines, in_pieces, pieces
from shardwright.train.data.sources.files.ranges import Range
from shardwright.train.data.sources.files.skipping import Skipping, no_longer_than
from shardwright.train.errors import UserError

CHECKED_BYTES = 2**20
CHECKED_ROWS = 100
CHECKED_REMOTE_FILES = 8
"""Of a path: each costs a request, and one that is wrong is found when it is read."""
HASHED_BYTES = 2**20
ROWS: dict[str, Callable[[File, str, Range | None, Skipping, bool], Iterator[Row]]] = {
    ".jsonl": json_objects.rows_of_lines,
    ".json": json_objects.rows_of_array,
    ".csv": delimited.rows,
    ".tsv": delimited.rows,
    **dict.fromkeys(TABLES, tables.rows),
}
"""What reads each format that has rows."""


def check_files(pattern: str, text_field: str, skips: bool | None = None) -> None:
    """Raise UserError where a file is missing or unreadable, going by its beginning, or empty.

    Under ``skips`` only where that is so of all that a path or glob names: reading skips those that
    are. None skips the empty ones alone, and of what a glob has matched.
    """
    paths = expand(pattern)
    if is_url(pattern):
        paths = paths[:CHECKED_REMOTE_FILES]
    wrong: list[UserError] = []
    empty = 0
    for path in paths:
        try:
            if check_file(path, text_field, skips=bool(skips)):
                continue
            if not is_glob(pattern) and not skips:
                raise is_empty(path)
            empty += 1
        except UserError as error:
            if not skips or isinstance(error, Unreachable):
                raise
            wrong.append(error)
    if empty == len(paths) and is_glob(pattern):
        raise UserError(
            f"data.paths: {pattern} matches {len(paths):,} files, and all of them are empty; "
            "fill them or correct the pattern"
        )
    if empty + len(wrong) == len(paths):
        raise next(iter(wrong), is_empty(paths[0]))


def check_file(path: Path | Remote, text_field: str, *, skips: bool = False) -> bool:
    """Return whether there is text in a file; raise UserError where it is missing or unreadable.

    Goes by its beginning: reads at most the first MiB, or the first row where that is longer, or
    if it ``skips`` a few rows that are bad.
    """
    if isinstance(path, Path) and os.path.isdir(path):
        raise is_directory(path)
    size_bytes = _size_bytes(path)  # before its name is blamed: it may not be there at all
    _format(path)
    has_content = size_bytes > 0 and _has_content(path, text_field, skips)
    return has_content or size_bytes > CHECKED_BYTES


def _format(file: File) -> str:
    """Return a file's format; raise UserError where none is known by its name."""
    if not is_known(file.name):
        raise BadDocument(
            "files of an unknown format",
            "data.paths: ",
            file,
            f" does not end in one of {KNOWN}; convert or rename it",
        )
    return ending(file.name)


def _size_bytes(path: Path | Remote) -> int:
    if isinstance(path, Remote):
        return 1 if path.size_bytes is None else path.size_bytes
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise is_missing(path) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _has_content(path: Path | Remote, text_field: str, skips: bool) -> bool:
    """Return whether there is text in the beginning of a file, or of one of its members."""
    first: BadDocument | None = None
    for file in members(path):
        kind = _format(file)
        bad = _Few() if skips else Skipping()
        has_content = True
        # A member is opened once: to decode its beginning only to see that it can be costs another.
        if kind not in TABLES and (kind == ".txt" or not isinstance(file, Member)):
            beginning = decoded(file, CHECKED_BYTES, bad=bad)
            if kind == ".txt" and skips:
                beginning = until_bad_bytes(beginning, file, bad)
            # All of it, not any(): every chunk has to be decoded.
            has_content = sum(len(text.strip()) for text in beginning) > 0
        if has_content and kind != ".txt":
            has_content = next(ROWS[kind](file, text_field, None, bad, False), None) is not None
        if has_content:
            return True
        first = first or bad.first
    if first is not None:
        raise first
    return False


class _Few(Skipping):
    """Skips some, to see whether a file's beginning has anything else."""

    def __init__(self) -> None:
        super().__init__({})

    def meet(self, error: BadDocument) -> None:
        super().meet(error)
        if self.count > CHECKED_ROWS:
            raise self.first or error


def read_file(
    path: Path | Remote,
    text_field: str,
    by_line: bool,
    within: Range | None = None,
    *,
    bad: Skipping | None = None,
    most_bytes: int | None = None,
    with_fields: bool = False,
) -> Iterator[Text]:
    """Yield the documents of a file: a row each, or the whole of a .txt (``by_line``: a line each).

    ``within`` is a range that `divided` has told, and None reads all of it. Memory is bounded by
    the longest row, for a .txt by ``PIECE_BYTES``, and by ``most_bytes``, of a longer document.
    ``with_fields`` asks for what else there is in a row.

    What cannot be read is a UserError, or if ``bad`` skips it is left out: a row alone where others
    behind it can be read, else all from there on.
    """
    bad = bad or Skipping()
    try:
        _format(path)
        if _size_bytes(path) == 0:
            return
        for file in members(path):
            documents = _documents(file, text_field, by_line, within, bad, with_fields)
            yield from no_longer_than(most_bytes, documents, file, bad)
    except UserError as error:
        bad.meet_file(error, path)


def _documents(
    file: File,
    text_field: str,
    by_line: bool,
    within: Range | None,
    bad: Skipping,
    with_fields: bool,
) -> Iterator[Text]:
    kind = _format(file)
    if kind != ".txt":
        try:
            for row in ROWS[kind](file, text_field, within, bad, with_fields):
                yield from pieces(*row)
        except UserError as error:  # of an archive's member: the next may be whole
            bad.meet_file(error, file)
        return
    chunks = decoded(file, within=within, bad=bad)
    if not by_line:
        yield from in_pieces(until_bad_bytes(chunks, file, bad) if bad.skips else chunks)
    else:
        lines = in_lines(chunks)
        yield from lines_without_bad_bytes(lines, file, bad) if bad.skips else lines


def identity(path: Path) -> list[str | int]:
    """Return what changes when a file's content does.

    Small files are hashed, so that a copy elsewhere counts as the same; of larger ones path, size,
    modification time and the time of the last change of any kind, which nobody can set, have to do.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    try:
        stat = path.stat()
        if stat.st_size <= HASHED_BYTES:
            return [kind, hashlib.blake2b(path.read_bytes()).hexdigest()]
    except OSError as error:
        raise unreadable(path, error) from None
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def identity_of_text(path: Path | Remote) -> list[str | int | None]:
    """Return `identity` with what the file is read as, where it is not in there by itself.

    Of a remote file it is what its filesystem tells: a version by the content, or by the time.
    """
    if isinstance(path, Remote):
        return [path.url, path.size_bytes, path.version]
    known = compression(path.name)
    return [*identity(path), *([ending(path.name)] if known not in (None, ".gz") else [])]
