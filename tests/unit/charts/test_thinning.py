from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.train.charts.series import Series
from shardwright.train.charts.thinning import (
    LEAST_POINTS,
    MOST_POINTS,
    line,
    points_each,
    smoothed,
    thinned,
)

VALUES = st.lists(st.none() | st.floats(-1e6, 1e6), max_size=200)


def of(values: list[float | None]) -> Series:
    steps = list(range(1, len(values) + 1))
    return Series(steps, [s * 10 for s in steps], [float(s) for s in steps], values)


@given(VALUES, st.integers(1, 50))
def test_no_extreme_is_lost_and_no_more_is_drawn_than_asked(
    values: list[float | None], most: int
) -> None:
    part = thinned(of(values), most)
    drawn = [y for _, y in line(part.steps, part) if y is not None]
    finite = [value for value in values if value is not None]
    assert len(part.means) <= most
    assert len(drawn) <= 2 * most
    assert (min(drawn), max(drawn)) == (min(finite), max(finite)) if finite else drawn == []
    places = [x for x, _ in line(part.steps, part)]
    assert places == sorted(places)
    assert all(1 <= x <= len(values) for x in places)


@given(VALUES.filter(lambda values: len(values) <= 50))
def test_a_short_series_is_drawn_point_by_point(values: list[float | None]) -> None:
    part = thinned(of(values), 50)
    assert part.size == 1
    assert line(part.steps, part) == list(zip(range(1, len(values) + 1), values, strict=True))


def test_a_gap_that_is_longer_than_a_group_stays_one() -> None:
    part = thinned(of([1.0] * 10 + [None] * 10 + [2.0] * 10), 6)
    assert part.means == [1.0, 1.0, None, None, 2.0, 2.0]
    assert [y for _, y in line(part.steps, part, 0.1)][2:4] == [None, None]


def test_a_thinned_curve_is_smoothed_as_the_whole_one() -> None:
    noisy = [math.exp(-i / 3000) + (0.2 if i % 2 else -0.2) for i in range(10_000)]
    whole = smoothed(noisy, 0.02)
    part = thinned(of(list(noisy)), 500)
    drawn = line(part.steps, part, 0.02)
    assert len(drawn) == 500
    for x, y in drawn[50:]:
        assert y == pytest.approx(whole[round(x) - 1], abs=0.005)


def test_smoothing_keeps_a_constant_and_its_gaps() -> None:
    assert smoothed([2.0, None, 2.0], 0.5) == pytest.approx([2.0, None, 2.0])
    assert smoothed([1.0, 5.0], 0.0) == [1.0, 5.0]
    assert smoothed([], 0.5) == []
    first, second = smoothed([1.0, 5.0], 0.5)
    assert (first, second is not None and 1.0 < second < 5.0) == (1.0, True)


def test_more_curves_have_fewer_points_each() -> None:
    counts = [points_each(curves) for curves in (0, 1, 30, 100, 1_000)]
    assert counts == [MOST_POINTS, MOST_POINTS, MOST_POINTS, 300, LEAST_POINTS]
    assert all(a >= b for a, b in itertools.pairwise(counts))
