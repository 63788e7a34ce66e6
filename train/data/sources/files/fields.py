"""Where in a row its text is: `data.text_field`, a name or the path to one within others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardwright.train.data.sources.files.errors import column_missing, no_text


def names_of(columns: Sequence[str] | Mapping[str, Any], field: str) -> list[str]:
    """Return the names that lead to a row's text: one, if there is a column called so. Pure.

    Else each but the last is of what the next is in: ``meta.body`` is in an object,
    ``messages.0.content`` in the first element of a list, ``messages.content`` in each of them.
    """
    return [field] if field in columns else field.split(".")


def texts_at(row: Mapping[str, Any], field: str, where: object) -> Iterator[str]:
    """Yield the texts of a row: one, none where it is null, or several of a list. Pure.

    Raises UserError where there is no such field, or no text in it.
    """
    yield from texts_within(row, names_of(row, field), field, where)


def others(row: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return what a row has besides its text, all of it where that is deeper within. Pure."""
    return {name: value for name, value in row.items() if name != field}


def texts_within(value: Any, names: Sequence[str], field: str, where: object) -> Iterator[str]:
    """Yield the texts of a value that names lead to, from there on. Pure."""
    if value is None:
        return
    if not names:
        yield from _texts(value, field, where)
        return
    name, *rest = names
    if isinstance(value, Mapping):
        if name not in value:
            raise column_missing(where, field, value)
        yield from texts_within(value[name], rest, field, where)
    elif isinstance(value, list) and name.isdecimal():
        for element in value[int(name) :][:1]:
            yield from texts_within(element, rest, field, where)
    elif isinstance(value, list):
        for element in value:
            yield from texts_within(element, names, field, where)
    else:
        raise no_text(where, field, type(value).__name__)


def _texts(value: Any, field: str, where: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(text, str | None) for text in value):
        yield from (text for text in value if text is not None)
    else:
        raise no_text(where, field, type(value).__name__)
