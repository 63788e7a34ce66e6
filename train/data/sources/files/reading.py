"""What a file holds: checked before a run starts, read, and told apart from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from shardwright.train.data.sources.files import delimited, json_objects, tables
from shardwright.train.data.sources.files.archives import members
from shardwright.train.data.sources.files.decoding import decoded
from shardwright.train.data.sources.files.errors import is_directory, is_empty, unreadable
from shardwright.train.data.sources.files.file import File
from shardwright.train.data.sources.files.formats import TABLES, compression, ending, format_of
from shardwright.train.data.sources.files.paths import expand, is_glob
from shardwright.train.data.sources.files.pieces import Text, in_lines, in_pieces, pieces
from shardwright.train.data.sources.files.ranges import Range
from shardwright.train.errors import UserError

CHECKED_BYTES = 2**20
HASHED_BYTES = 2**20
ROWS: dict[str, Callable[[File, str, Range | None], Iterator[str]]] = {
    ".jsonl": json_objects.rows_of_lines,
    ".json": json_objects.rows_of_array,
    ".csv": delimited.rows,
    ".tsv": delimited.rows,
    **dict.fromkeys(TABLES, tables.rows),
}
"""What reads each format that has rows."""


def check_files(pattern: str, text_field: str) -> None:
    """Raise UserError where a file is missing or unreadable, going by its beginning, or empty.

    An empty file that a glob has matched is none of the user's choosing: reading skips it,
    as long as another is not empty.
    """
    paths = expand(pattern)
    empty = [path for path in paths if not check_file(path, text_field)]
    if empty and not is_glob(pattern):
        raise is_empty(empty[0])
    if len(empty) == len(paths):
        raise UserError(
            f"data.paths: {pattern} matches {len(paths):,} files, and all of them are empty; "
            "fill them or correct the pattern"
        )


def check_file(path: Path, text_field: str) -> bool:
    """Return whether there is text in a file; raise UserError where it is missing or unreadable.

    Goes by its beginning: reads at most the first MiB, or the first row where that is longer.
    """
    if os.path.isdir(path):
        raise is_directory(path)
    format_of(path)
    size_bytes = _size_bytes(path)
    has_content = size_bytes > 0 and _has_content(path, text_field)
    return has_content or size_bytes > CHECKED_BYTES


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"data.paths: {path} does not exist (looked in {os.getcwd()}); correct the path"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _has_content(path: Path, text_field: str) -> bool:
    """Return whether there is text in the beginning of a file, or of its first member."""
    for file in members(path):
        kind = format_of(file)
        has_content = True
        # A member is opened once: to decode its beginning only to see that it can be costs another.
        if kind not in TABLES and (kind == ".txt" or isinstance(file, Path)):
            # All of it, not any(): every chunk has to be decoded.
            has_content = sum(len(text.strip()) for text in decoded(file, CHECKED_BYTES)) > 0
        if has_content and kind != ".txt":
            has_content = next(ROWS[kind](file, text_field, None), None) is not None
        if has_content:
            return True
    return False


def read_file(
    path: Path, text_field: str, by_line: bool, within: Range | None = None
) -> Iterator[Text]:
    """Yield the documents of a file: a row each, or the whole of a .txt (``by_line``: a line each).

    ``within`` is a range that `divided` has told, and None reads all of it.

    Memory is bounded by the longest row, or by ``PIECE_BYTES`` for a .txt. Raises UserError at the
    first byte or row that cannot be read.
    """
    format_of(path)
    if _size_bytes(path) == 0:
        return
    for file in members(path):
        kind = format_of(file)
        if kind != ".txt":
            for row in ROWS[kind](file, text_field, within):
                yield from pieces(row)
        elif by_line:
            yield from in_lines(decoded(file, within=within))
        else:
            yield from in_pieces(decoded(file))


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


def identity_of_text(path: Path) -> list[str | int]:
    """Return `identity` with what the file is read as, where it is not in there by itself."""
    known = compression(path.name)
    return [*identity(path), *([ending(path.name)] if known not in (None, ".gz") else [])]
