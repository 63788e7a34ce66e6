"""Every number that a run has logged, as a series over steps, tokens and time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import compress
from operator import lt
from pathlib import Path
from typing import Any

AXES = ("step", "tokens", "time")
"""What each line of metrics.jsonl is placed by; time is in seconds since 1970."""
_LARGEST = 1e300
"""What a picture can still be scaled to."""


@dataclass(frozen=True)
class Series:
    """One metric of a run, in order of its steps."""

    steps: Sequence[int]
    tokens: Sequence[int]
    times: Sequence[float]
    values: Sequence[float | None]
    """None is what was logged and is no finite number."""

    @property
    def finite(self) -> list[tuple[int, float]]:
        """Step and value of what can be drawn."""
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if v is not None]

    @property
    def not_finite(self) -> list[int]:
        """The steps at which a value was logged that is no finite number."""
        return [s for s, v in zip(self.steps, self.values, strict=True) if v is None]


def read(metrics: Path) -> dict[str, Series]:
    """Return the series of a metrics.jsonl by their names; none where there is no such file."""
    lines: list[str] = []
    with suppress(OSError):
        if metrics.is_file():  # a link to a device has no end
            lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    return parsed(lines)


def parsed(lines: Iterable[str]) -> dict[str, Series]:
    """Return the series of lines of JSON. Pure.

    A line that cannot be read is skipped, such as the one that is being written. Of a step that was
    logged twice the later value counts.
    """
    # Nearly all lines have the same keys, and are taken apart together.
    alike: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            alike.setdefault(tuple(entry), []).append(tuple(entry.values()))
    parts: dict[str, list[Series]] = {}
    for keys, rows in alike.items():
        if set(AXES) <= set(keys):
            for name, part in _together(dict(zip(keys, zip(*rows, strict=True), strict=True))):
                parts.setdefault(name, []).append(part)
    return {name: _in_order(of_name) for name, of_name in parts.items()}


def _together(columns: dict[str, Sequence[Any]]) -> Iterator[tuple[str, Series]]:
    """Yield the metrics of lines that have the same keys."""
    places = [columns.pop(axis) for axis in AXES]
    if not all(_is_finite(value) for place in places for value in place):
        chosen = [all(map(_is_finite, place)) for place in zip(*places, strict=True)]
        places = [list(compress(place, chosen)) for place in places]
        columns = {name: list(compress(column, chosen)) for name, column in columns.items()}
    for name, values in columns.items():
        if name != "samples" and all(map(_is_number, values)):
            finite = [value if _is_finite(value) else None for value in values]
            yield name, Series(places[0], places[1], places[2], finite)


def _in_order(parts: Sequence[Series]) -> Series:
    steps, *others = (
        [value for part in parts for value in getattr(part, field.name)] for field in fields(Series)
    )
    if all(map(lt, steps, steps[1:])):
        return Series(steps, *others)
    rows = {row[0]: row for row in zip(steps, *others, strict=True)}
    return Series(*zip(*(rows[step] for step in sorted(rows)), strict=True))


def _is_number(value: Any) -> bool:
    """Return whether a logged value is meant as a number: JSON has none that is not finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_finite(value: Any) -> bool:
    return value is not None and _is_number(value) and abs(value) < _LARGEST
