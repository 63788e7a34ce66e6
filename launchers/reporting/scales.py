"""How the values of a setting, or of an objective, lie along an axis. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.launchers.reporting.differences import written

_DECADES = 10.0
"""From this ratio of the largest to the smallest value on, they lie along a logarithm."""
_MOST_TICKS = 7


@dataclass(frozen=True)
class Scale:
    """Numbers between two ends, or words in the order in which they came."""

    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    names: tuple[str, ...] = ()
    """Words; none of them where the values are numbers."""

    def place(self, value: Any) -> float:
        """Return where a value lies, from 0 to 1."""
        if self.names:
            return self.names.index(written(value)) / max(1, len(self.names) - 1)
        low, high, at = (self._along(float(v)) for v in (self.low, self.high, value))
        return 0.5 if high == low else (at - low) / (high - low)

    def _along(self, value: float) -> float:
        return math.log(value) if self.is_log else value

    def ticks(self, values: Sequence[Any]) -> list[tuple[float, str]]:
        """Return places with what stands there: each value where they are few, else both ends."""
        if self.names:
            return [(self.place(name), name) for name in self.names]
        numbers = sorted({float(value) for value in values})
        shown = numbers if len(numbers) <= _MOST_TICKS else [self.low, self.high]
        return [(self.place(value), f"{value:.4g}") for value in shown]


def is_number(value: Any) -> bool:
    """Return whether a value is a number that has a place on an axis."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and math.isfinite(value)


def scale_of(values: Sequence[Any]) -> Scale:
    """Return the scale of values, of which there are some."""
    if not all(map(is_number, values)):
        return Scale(names=tuple(dict.fromkeys(map(written, values))))
    low, high = float(min(values)), float(max(values))
    return Scale(low, high, is_log=low > 0 and high / low >= _DECADES)
