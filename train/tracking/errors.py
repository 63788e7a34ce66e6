"""Errors of trackers' libraries as people are told of them: in a line, and without any key."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

from shardwright.train.config.tracking import without_password

_NAMES = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$")
_SHORTEST = 4
"""A shorter value is no key, and would take letters out of words."""


def hidden(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text with *** for each key that the environment holds, and for passwords. Pure."""
    keys = {
        value
        for name, value in environment.items()
        if _NAMES.search(name) and len(value) >= _SHORTEST
    }
    for key in sorted(keys, key=len, reverse=True):
        text = text.replace(key, "***")
    return without_password(text)


def note(name: str, error: Exception) -> None:
    """Leave an error in the log of the rank."""
    print(hidden(f"{name} fails: {error!r}"), file=sys.stderr, flush=True)


def in_a_line(error: Exception) -> str:
    """Return an error as a person is told of it."""
    text = " ".join(str(error).partition("\nConsider")[0].split())
    return hidden(text) or type(error).__name__
