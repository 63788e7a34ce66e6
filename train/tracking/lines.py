"""The lines of metrics.jsonl as they come, and which points of curves they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
Point = tuple[str, int]
"""Of a curve: its name and a step."""


class Tail:
    """The lines of metrics.jsonl, as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def rewind(self) -> None:
        self._position = 0

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the whole lines that have come; what a full disk has cut short is left out."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                self._position += len(text)
                with suppress(ValueError, TypeError, KeyError):
                    line = json.loads(text)
                    line["step"], line["time"] = int(line["step"]), float(line["time"])
                    yield line


def numbers(line: Line) -> dict[str, float]:
    """Return a line's values, those left out that were not finite. Pure."""
    return {
        name: float(value) if isinstance(value, bool) else value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def points(lines: Iterable[Line]) -> dict[Point, tuple[float, float]]:
    """Return the value and the time of each point of some lines. Pure.

    Two lines of a step, of the loss and of an evaluation, share its counts: the first has them.
    """
    found: dict[Point, tuple[float, float]] = {}
    for line in lines:
        for name, value in numbers(line).items():
            if name != "time":
                found.setdefault((name, line["step"]), (value, line["time"]))
    return found


class Missing:
    """What a tracker lacks of the lines that come in order, so that no point stands there twice."""

    def __init__(self, there: Iterable[Point] = ()) -> None:
        self._there = set(there)
        self._last: dict[str, int] = {}
        """The step up to which a curve has come by."""

    def of(self, line: Line) -> dict[str, float]:
        """Return those values of a line that are not there; from now on they are."""
        step, new = line["step"], {}
        for (name, _), (value, _) in points([line]).items():
            if step <= self._last.get(name, -1):
                continue
            self._last[name] = step
            if (name, step) in self._there:
                self._there.remove((name, step))  # it does not come again
            else:
                new[name] = value
        return new
