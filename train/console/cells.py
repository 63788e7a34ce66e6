"""How many columns of a terminal a text takes, and a text that takes no more than there are."""

from __future__ import annotations

import unicodedata

ELLIPSIS = "…"


def width(text: str) -> int:
    """Return the columns that a text without control characters takes. Pure."""
    return len(text) if text.isascii() else sum(map(_width, text))


def cut(text: str, columns: int, *, keeps_end: bool = False) -> str:
    """Return a text in at most so many columns, with an ellipsis where it is cut. Pure."""
    if width(text) <= columns:
        return text
    room, kept = columns - 1, []
    for letter in reversed(text) if keeps_end else text:
        room -= _width(letter)
        if room < 0:
            break
        kept.append(letter)
    if columns < 1:
        return ""
    return ELLIPSIS + "".join(reversed(kept)) if keeps_end else "".join(kept) + ELLIPSIS


def padded(text: str, columns: int, *, to_the_left: bool = True) -> str:
    """Return a text with blanks up to so many columns. Pure."""
    blanks = " " * (columns - width(text))
    return text + blanks if to_the_left else blanks + text


def plain(text: str) -> str:
    """Return a text in one line without what would move a terminal's cursor. Pure."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _width(letter: str) -> int:
    if unicodedata.combining(letter) or unicodedata.category(letter) == "Cf":
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
