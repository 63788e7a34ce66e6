"""The loss curve of a run: read from metrics.jsonl, shown as a table and as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from shardwright.train.run_directory.metrics import Point

TABLE_ROWS = 10
DRAWN_POINTS = 400
"""More than these are averaged in groups: the picture is not much wider in pixels."""


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


# --- the picture --------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 34, 46
_TRAINING, _EVALUATION = "#3b6fb6", "#c4501b"


def picture(points: Sequence[Point]) -> str | None:
    """Return an SVG of both losses over the steps; None where no line can be drawn. Pure."""
    training = [(p.step, p.loss) for p in points if p.loss is not None]
    evaluation = [(p.step, p.eval_loss) for p in points if p.eval_loss is not None]
    if max(len(training), len(evaluation)) < 2:
        return None
    steps = [step for step, _ in training + evaluation]
    losses = [loss for _, loss in training + evaluation]
    x_ticks = _ticks(0, max(steps))
    y_ticks = _ticks(min(losses), max(losses))
    low, high = min(y_ticks[0], *losses), max(y_ticks[-1], *losses)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(x_ticks[-1], *steps)

    def y(loss: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / (high - low)

    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" role="img" font-family="sans-serif" font-size="12">',
        "<title>Loss over the steps of the training</title>",
        # A ground of its own, as a page may be dark.
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for tick in y_ticks:
        parts.append(
            f'<path d="M{left} {y(tick):.1f}H{right}" stroke="#dddddd"/>'
            f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#444444">'
            f"{tick:g}</text>"
        )
    for tick in x_ticks:
        parts.append(
            f'<path d="M{x(tick):.1f} {bottom}v5" stroke="#888888"/>'
            f'<text x="{x(tick):.1f}" y="{bottom + 19}" text-anchor="middle" fill="#444444">'
            f"{tick:,.0f}</text>"
        )
    parts += [
        f'<path d="M{left} {bottom}H{right}" stroke="#888888"/>',
        f'<text x="{(left + right) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle" '
        'fill="#444444">step</text>',
    ]
    lines = (("training loss", training, _TRAINING), ("evaluation loss", evaluation, _EVALUATION))
    legend_x = left
    for name, values, colour in lines:
        if not values:
            continue
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in _thinned(values))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(values) <= 40:
            parts += [
                f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3" fill="{colour}"/>'
                for step, loss in values
            ]
        parts.append(
            f'<rect x="{legend_x}" y="12" width="14" height="4" fill="{colour}"/>'
            f'<text x="{legend_x + 20}" y="18" fill="#222222">{name}</text>'
        )
        legend_x += 140
    return "\n".join([*parts, "</svg>"]) + "\n"


def _thinned(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `DRAWN_POINTS` points, each the mean of its neighbours."""
    size = math.ceil(len(values) / DRAWN_POINTS)
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [(fmean(step for step, _ in g), fmean(loss for _, loss in g)) for g in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers, a whole multiple of one unit apart, that span a range."""
    span = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 5))
    unit = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 6)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [round(i * unit, 10) for i in range(first, max(last, first + 1) + 1)]
