"""What is drawn of a long series: extremes and means of neighbours, and its smoothing. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TypeVar

from shardwright.train.charts.series import Series

DIGITS = 6
"""Of what is smoothed: its last ones are noise, also of what is constant."""
MOST_POINTS = 1_000
"""Drawn of a curve: about as many as a wide window has pixels."""
LEAST_POINTS = 200
MOST_POINTS_OF_ALL = 30_000
"""Of all curves in a chart: what a browser draws at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Thinned:
    """Groups of neighbours of a series; each a single point where that is not too long."""

    size: int
    """Points of a group, at the most."""
    steps: Sequence[int]
    """Where each group begins, and behind these where the last one ends."""
    tokens: Sequence[int]
    times: Sequence[float]
    means: Sequence[float | None]
    """Of what is finite in a group; None where nothing is."""
    firsts: Sequence[float | None]
    """Of a group's lowest and highest value the one that came first, and the other."""
    seconds: Sequence[float | None]


def points_each(curves: int) -> int:
    """Return how many points of each curve are drawn where a chart has this many curves."""
    return min(MOST_POINTS, max(LEAST_POINTS, MOST_POINTS_OF_ALL // max(1, curves)))


def thinned(series: Series, most: int = MOST_POINTS) -> Thinned:
    """Return a series in at most ``most`` groups, whose extremes and mean are kept."""
    count = len(series.values)
    size = max(1, math.ceil(count / most))
    parts = math.ceil(count / size)
    # Nearly the same number in each: the mean of fewer would be noisier.
    ends = [count * i // parts for i in range(parts + 1)] if parts else [0]
    groups = [series.values[begin:end] for begin, end in pairwise(ends)]
    extremes = [_extremes(group) for group in groups]
    return Thinned(
        size,
        _borders(series.steps, ends),
        _borders(series.tokens, ends),
        _borders(series.times, ends),
        [_mean(group) for group in groups],
        [first for first, _ in extremes],
        [second for _, second in extremes],
    )


def _borders(places: Sequence[T], ends: Sequence[int]) -> list[T]:
    return [*(places[end] for end in ends[:-1]), *places[-1:]]


def _mean(group: Sequence[float | None]) -> float | None:
    finite = [value for value in group if value is not None]
    return fmean(finite) if finite else None


def _extremes(group: Sequence[float | None]) -> tuple[float | None, float | None]:
    finite = [value for value in group if value is not None]
    if not finite:
        return None, None
    low, high = min(finite), max(finite)
    return (low, high) if finite.index(low) <= finite.index(high) else (high, low)


def smoothed(values: Sequence[float | None], share: float) -> list[float | None]:
    """Return the moving average of a curve, whose weights fall by e over a share of its length.

    As it is a share of the length, a thinned curve is smoothed as the whole one is; one that is
    less than a point changes nothing. What came before the first value has no weight. A gap stays
    one.
    """
    if share * len(values) < 1:
        return list(values)
    keep = math.exp(-1 / (share * len(values)))
    total, weight = 0.0, 0.0
    found: list[float | None] = []
    for value in values:
        if value is None:
            found.append(None)
            continue
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        found.append(float(f"{total / weight:.{DIGITS}g}"))
    return found


def line(
    places: Sequence[float], part: Thinned, share: float = 0.0
) -> list[tuple[float, float | None]]:
    """Return the points of the line that is drawn: through the extremes, or smoothed means.

    ``places`` are the borders of the groups on the axis that is chosen.
    """
    if part.size == 1:
        return list(zip(places, smoothed(part.means, share), strict=False))
    middles = [(here + there) / 2 for here, there in pairwise(places)]
    if share > 0:
        return list(zip(middles, smoothed(part.means, share), strict=True))
    return [
        point
        for here, middle, first, second in zip(
            places, middles, part.firsts, part.seconds, strict=False
        )
        for point in ((here, first), (middle, second))
    ]
