"""What a name in a config means on this machine: a path, or a name on a hub. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def absolute(path: str | Path) -> str:
    """Return a path that means the same from any working directory, `~` expanded."""
    return os.path.abspath(os.path.expanduser(path))


def absolute_if_here(name: str) -> str:
    """Return the path of what a name means here; a hub's name as it is."""
    return absolute(name) if os.path.isdir(os.path.expanduser(name)) or is_path(name) else name


def is_path(name: str) -> bool:
    """Return whether a name can only be a path: none of a hub's is like that. Pure."""
    return name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form that a hub gives, which a short relative path has too."""
    return not is_path(name)


def not_a_directory(key: str, name: str, what: str) -> Iterator[str]:
    """Yield a message where a name can only be a path, and does not lead to a directory."""
    if not is_path(name):
        return
    if not os.path.lexists(name):
        yield f"{key}={name} does not exist; give the directory of {what}, or its name on the hub"
    elif not os.path.isdir(name):
        yield f"{key}={name} is a file; give the directory that holds {what}"
