"""Arguments as programs get them: paths of a person, and what passed through others' shells."""

from __future__ import annotations

import base64
import os
from pathlib import Path

ENCODED = "base64:"


def encoded(argument: str) -> str:
    """Return an argument that no shell and no pdsh changes, of letters, digits, : - _ and =."""
    return ENCODED + base64.urlsafe_b64encode(argument.encode()).decode()


def decoded(argument: str) -> str:
    """Return what `encoded` was given; any other argument as it is."""
    if not argument.startswith(ENCODED):
        return argument
    return base64.urlsafe_b64decode(argument.removeprefix(ENCODED)).decode()


def path(argument: str) -> Path:
    """Return a path, `~` expanded: no shell does that behind a `=` or within quotes."""
    return Path(os.path.expanduser(argument))
