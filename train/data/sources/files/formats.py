"""Which files are read, by how their names end."""

from __future__ import annotations

from pathlib import Path

from shardwright.train.errors import UserError

TABLES = (".parquet", ".arrow", ".feather")
FORMATS = (".txt", ".jsonl", ".csv", *TABLES)


def is_known(path: Path) -> bool:
    """Return whether a file's name ends as one of a format that is read. Pure."""
    kind = ending(path)
    return kind in FORMATS and not (kind in TABLES and path.suffix == ".gz")


def format_of(path: Path) -> str:
    kind = ending(path)
    if not is_known(path):
        raise UserError(
            f"data.paths: {path} does not end in one of {', '.join(FORMATS)} "
            "(text files also .gz); convert or rename it"
        )
    return kind


def ending(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
