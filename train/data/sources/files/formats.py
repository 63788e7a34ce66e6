"""Which files are read, by how their names end."""

from __future__ import annotations

from pathlib import PurePath

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
TEXTS = (".txt", ".jsonl", ".json", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather")
FORMATS = (*TEXTS, *TABLES)
ARCHIVES = (".zip", ".tar")
NOTES = ("state.json", "dataset_info.json")
"""What datasets' `save_to_disk` writes beside its tables, the first always."""
KNOWN = (
    f"{', '.join(FORMATS)} ({', '.join(TEXTS)} also within {', '.join(ARCHIVES)}, and these but "
    f".zip also as {', '.join(COMPRESSIONS)})"
)


def ending(name: str) -> str:
    """Return the last ending of a name, below that of a compression where there is one. Pure."""
    path = PurePath(name)
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def compression(name: str) -> str | None:
    """Return the ending of a name's compression. Pure."""
    suffix = PurePath(name).suffix
    return suffix if suffix in COMPRESSIONS else None


def is_known(name: str) -> bool:
    """Return whether a file's name ends as one of a format that is read. Pure."""
    kind = ending(name)
    compressible = kind in TEXTS or kind == ".tar"
    return compressible or (kind in (*TABLES, *ARCHIVES) and not compression(name))


def is_note(name: str) -> bool:
    """Return whether a file beside what datasets has saved is its own, by its name. Pure.

    It notes there what it saved, and keeps the results of its computations.
    """
    return name in NOTES or name.startswith("cache-")
