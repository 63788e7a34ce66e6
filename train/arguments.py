"""Arguments of ranks that pass through other programs' shells on their way."""

from __future__ import annotations

import base64

ENCODED = "base64:"


def encoded(argument: str) -> str:
    """Return an argument that no shell and no pdsh changes, of letters, digits, : - _ and =."""
    return ENCODED + base64.urlsafe_b64encode(argument.encode()).decode()


def decoded(argument: str) -> str:
    """Return what `encoded` was given; any other argument as it is."""
    if not argument.startswith(ENCODED):
        return argument
    return base64.urlsafe_b64decode(argument.removeprefix(ENCODED)).decode()
