"""The curves of runs as text: braille in colours, or letters where there are none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from shardwright.train.charts.series import Series
from shardwright.train.console import cells

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Points = Sequence[tuple[int, float]]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = ("blue", "magenta", "green", "yellow", "cyan", "red")
_LEAST_WIDTH, _FRAME = 24, 10
"""Columns of a picture, and of its frame with the numbers on the right."""


def drawn(
    title: str, curves: Mapping[str, Series], width: int, height: int, *, in_colours: bool
) -> list[str]:
    """Return one picture with the curve of each run, by its letter; none where there is no point.

    Points that fall into the same column are drawn as their mean.
    """
    import uniplot

    inner = max(_LEAST_WIDTH, width - _FRAME)
    thin = {name: means(series.finite, 2 * inner) for name, series in curves.items()}
    shown = {name: points for name, points in thin.items() if points}
    if not shown:
        return []
    letters = list(shown)
    options = (
        {
            "color": [COLOURS[LETTERS.index(name) % len(COLOURS)] for name in letters],
            "character_set": "braille",
        }
        if in_colours
        else {"color": False, "character_set": "ascii", "force_ascii_characters": letters}
    )
    picture = uniplot.plot_to_string(
        xs=[[step for step, _ in points] for points in shown.values()],
        ys=[[value for _, value in points] for points in shown.values()],
        lines=[len(points) > 1 for points in shown.values()],
        width=inner,
        height=max(4, height),
        title=title,
        legend_labels=letters,
        x_gridlines=[],
        y_gridlines=[],
        **options,
    )
    lines = picture if isinstance(picture, list) else str(picture).split("\n")
    return [line.rstrip() for line in lines if line.strip()]


def means(points: Points, most: int) -> list[tuple[float, float]]:
    """Return at most so many points: the mean step and value of each stretch of steps. Pure."""
    if len(points) <= most:
        return [(float(step), value) for step, value in points]
    first, last = points[0][0], points[-1][0]
    of_stretch: dict[int, list[tuple[int, float]]] = {}
    for step, value in points:
        stretch = min(most - 1, (step - first) * most // max(1, last - first))
        of_stretch.setdefault(stretch, []).append((step, value))
    return [
        (sum(step for step, _ in group) / len(group), sum(v for _, v in group) / len(group))
        for _, group in sorted(of_stretch.items())
    ]


def beside(left: Sequence[str], right: Sequence[str], width: int) -> list[str]:
    """Return two pictures beside each other, the second one from a column on. Pure."""
    return [
        one + " " * max(1, width - visible_width(one)) + other
        for one, other in zip_longest(left, right, fillvalue="")
    ]


def visible_width(line: str) -> int:
    """Return the columns of a line that may have colours. Pure."""
    return cells.width(_COLOUR.sub("", line))
