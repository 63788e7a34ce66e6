"""The losses of a run in a few rows, as its model card shows them."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.train.run_directory.metrics import Point

TABLE_ROWS = 10


def table(points: Sequence[Point]) -> list[list[str]]:
    """Return about `TABLE_ROWS` rows of step, tokens, training loss and evaluation loss. Pure.

    Evaluated steps come before others; the first and the last row are those of all.
    """
    measured = [p for p in points if p.eval_loss is not None]
    few = len(measured) < TABLE_ROWS // 2
    chosen = {*_spread(points, TABLE_ROWS), *measured} if few else _spread(measured, TABLE_ROWS)
    return [
        [f"{p.step:,}", f"{p.tokens:,}", _loss(p.loss), _loss(p.eval_loss)]
        for p in sorted(chosen, key=lambda p: p.step)
    ]


def _spread(points: Sequence[Point], count: int) -> list[Point]:
    """Return so many points, or all where there are fewer: the first, the last, and between."""
    if len(points) <= count:
        return list(points)
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
