"""What is wrong with a file, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from shardwright.train.data.sources.files.file import File
from shardwright.train.data.sources.files.formats import FORMATS
from shardwright.train.errors import UserError

FILES = "rests of files that cannot be read"


class BadDocument(UserError):
    """What cannot be read, where the rest can; the message is put together where it is shown.

    A line's number in it may have to be counted.
    """

    def __init__(self, kind: str, before: str, place: object, after: str) -> None:
        super().__init__(kind, before, place, after)
        self.kind = kind
        """What it is one of, in the plural."""
        self.place = place
        self.before = before
        self.after = after

    def __str__(self) -> str:
        return f"{self.before}{self.place}{self.after}"

    def __reduce__(self) -> tuple[type[UserError], tuple[str]]:
        # From a process to another goes what is told; a member of an archive would not.
        return UserError, (str(self),)


class Unreachable(UserError):
    """A remote file that does not come: of that no document is to blame, and none is skipped."""

    def __init__(self, url: str, error: Exception, offset: int | None = None) -> None:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        where = "" if offset is None else f" from byte {offset:,} on"
        super().__init__(
            f"data.paths: {url} cannot be read{where} ({reason}); see that it can be reached from "
            "here and with these rights, and start again"
        )

    def __reduce__(self) -> tuple[type[UserError], tuple[str]]:
        return UserError, (str(self),)


def is_empty(path: File) -> UserError:
    """Return the error for a file that was named and holds nothing, or blank documents alone."""
    has_bytes = isinstance(path, Path) and path.is_file() and path.stat().st_size > 0
    what = "holds nothing to train on" if has_bytes else "is empty"
    return UserError(f"data.paths: {path} {what}; fill it or leave it out")


def is_missing(path: File) -> UserError:
    """Return the error for a path that leads nowhere."""
    return UserError(
        f"data.paths: {path} does not exist (looked in {os.getcwd()}); correct the path"
    )


def is_directory(path: Path) -> UserError:
    inside = (kind for kind in FORMATS if next(path.rglob(f"*{kind}"), None))
    example = path / "**" / f"*{next(inside, '.txt')}"
    return UserError(f"data.paths: {path} is a directory; name its files, for example {example}")


def unreadable(path: File, error: Exception) -> UserError:
    if isinstance(error, IsADirectoryError) and isinstance(path, Path):
        return is_directory(path)
    reason = getattr(error, "strerror", None) or error
    return file_is_bad("cannot read ", path, f" ({reason}); make it readable or leave it out")


def file_is_bad(before: str, place: object, after: str) -> BadDocument:
    """Return the error for a file of which nothing more can be read."""
    return BadDocument(FILES, f"data.paths: {before}", place, after)


def row_is_bad(kind: str, place: object, after: str) -> BadDocument:
    """Return the error for a row, behind which others can be read."""
    return BadDocument(f"rows {kind}", "data.paths: ", place, after)


def column_missing(where: object, text_field: str, columns: Iterable[str]) -> BadDocument:
    """Return the error for a table without the text column."""
    names = ", ".join(sorted(columns)) or "none"
    return BadDocument(
        "rows or tables without data.text_field",
        f"data.text_field={text_field}: ",
        where,
        f" has no such column (it has: {names}); set data.text_field to the one that holds the "
        "text",
    )


def twice(where: object, text_field: str) -> UserError:
    return UserError(
        f"data.text_field={text_field}: {where} has two columns of that name; rename one of them"
    )


def no_text(where: object, text_field: str, found: str) -> BadDocument:
    return BadDocument(
        "rows or tables with no text in data.text_field",
        f"data.text_field={text_field}: ",
        where,
        f" holds {found} there, not text; set data.text_field to the column that holds the text",
    )
