"""Files that desktop systems, sync tools and file systems drop into any directory.

No engine writes or reads one of these names, so that they neither damage a checkpoint nor count as
a part of it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePath

_NAMES = (
    # macOS, and its attributes on disks that have none
    *(".ds_store", "._*", ".appledouble", ".localized", ".trashes", ".fseventsd", ".spotlight-*"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),  # Windows
    *(".directory", ".~lock.*#", "@eadir"),  # KDE, LibreOffice, Synology
    *(".dropbox", ".dropbox.attr", ".stfolder", ".syncthing.*"),
    *(".nfs*", ".fuse_hidden*"),  # deleted, and still open somewhere
)


def is_junk(path: PurePath | str) -> bool:
    """Return whether a file, by its name or that of a folder above it, is of these. Pure."""
    return any(fnmatchcase(part.lower(), name) for part in PurePath(path).parts for name in _NAMES)
