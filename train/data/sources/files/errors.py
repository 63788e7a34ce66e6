"""What is wrong with a file, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shardwright.train.data.sources.files.file import File
from shardwright.train.data.sources.files.formats import FORMATS
from shardwright.train.errors import UserError


def is_empty(path: File) -> UserError:
    """Return the error for a file that was named and holds nothing."""
    return UserError(f"data.paths: {path} is empty; fill it or leave it out")


def is_directory(path: Path) -> UserError:
    inside = (kind for kind in FORMATS if next(path.rglob(f"*{kind}"), None))
    example = path / "**" / f"*{next(inside, '.txt')}"
    return UserError(f"data.paths: {path} is a directory; name its files, for example {example}")


def unreadable(path: File, error: Exception) -> UserError:
    if isinstance(error, IsADirectoryError) and isinstance(path, Path):
        return is_directory(path)
    reason = getattr(error, "strerror", None) or error
    return UserError(f"data.paths: cannot read {path} ({reason}); make it readable or leave it out")


def column_missing(where: object, text_field: str, columns: Iterable[str]) -> UserError:
    """Return the error for a table without the text column."""
    names = ", ".join(sorted(columns)) or "none"
    return UserError(
        f"data.text_field={text_field}: {where} has no such column (it has: {names}); "
        "set data.text_field to the one that holds the text"
    )


def twice(where: object, text_field: str) -> UserError:
    return UserError(
        f"data.text_field={text_field}: {where} has two columns of that name; rename one of them"
    )


def no_text(where: object, text_field: str, found: str) -> UserError:
    return UserError(
        f"data.text_field={text_field}: {where} holds {found} there, not text; "
        "set data.text_field to the column that holds the text"
    )
