"""Documents in pieces: what is made of each takes many times its size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

PIECE_BYTES = 2**18


class Text(NamedTuple):
    """A document, or one piece of a long one."""

    text: str
    begins: bool = True
    ends: bool = True
    fields: Mapping[str, Any] | None = None
    """What else there is in its row, at the first piece, where somebody asks for it."""


class Row(NamedTuple):
    """A document that is in a row."""

    text: str
    fields: Mapping[str, Any] | None = None
    """What else there is in it, where somebody asks for it."""


def pieces(text: str, fields: Mapping[str, Any] | None = None) -> Iterator[Text]:
    """Yield a document, a long one in pieces: what is made of each takes many times its size."""
    if len(text) <= PIECE_BYTES:
        yield Text(text, fields=fields)
    else:
        parts = (text[i : i + PIECE_BYTES] for i in range(0, len(text), PIECE_BYTES))
        yield from in_pieces(parts, fields)


def in_pieces(chunks: Iterable[str], fields: Mapping[str, Any] | None = None) -> Iterator[Text]:
    """Yield one document in pieces, cut after a line where there is one, else before a space."""
    rest, begins = "", True
    for chunk in chunks:
        rest += chunk
        if cut := _cut(rest):
            yield Text(rest[:cut], begins, ends=False, fields=fields)
            rest, begins, fields = rest[cut:], False, None
    yield Text(rest, begins, ends=True, fields=fields)


def in_lines(chunks: Iterable[str]) -> Iterator[Text]:
    """Yield each line as a document, a long one in pieces."""
    rest, begins = "", True
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            yield Text(line, begins, ends=True)
            begins = True
        if cut := _cut(rest):
            yield Text(rest[:cut], begins, ends=False)
            rest, begins = rest[cut:], False
    if rest or not begins:
        yield Text(rest, begins, ends=True)


def _cut(text: str) -> int:
    """Return where to end a piece; 0 where the text is too short to be one."""
    half = len(text) // 2
    if half < PIECE_BYTES // 2:
        return 0
    return text.rfind("\n", half) + 1 or max(text.rfind(" ", half), 0) or len(text)
