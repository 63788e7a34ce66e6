"""What the script of a page is given: curves, colours and charts as JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardwright.launchers.reporting.curves import Chart, Choice, Curve
from shardwright.launchers.reporting.facts import Run
from shardwright.launchers.reporting.sweep_charts import SweepChart
from shardwright.train.charts import charts
from shardwright.train.charts.charts import MOST_NAMED, STEPS, Axis, Colours

STYLES = ("light", "dark")
SMOOTHING = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Shares of a curve's length, the positions of the slider."""
_DEFAULT_SMOOTHING = 3
_SMOOTHED_FROM = 100
"""Points of a curve from which on it is smoothed unless asked otherwise."""
_DIGITS = 6


def payload(
    runs: Sequence[Run],
    shown: Sequence[Chart],
    choices: Sequence[Choice],
    of_sweeps: Iterable[SweepChart],
) -> dict[str, Any]:
    """Return all that the script of a page draws."""
    longest = max((curve.points for chart in shown for curve in chart.curves), default=0)
    axes = _Axes(runs)
    return {
        "styles": {style: {"config": charts.theme(style)} for style in STYLES},
        "smoothing": SMOOTHING,
        "state": {
            "x": "steps",
            "smoothing": _DEFAULT_SMOOTHING if longest >= _SMOOTHED_FROM else 0,
            "marks": len(runs) <= MOST_NAMED,
        },
        "runs": [
            {"label": run.label, "begun": axes.begun[number], "marks": _marks(run)}
            for number, run in enumerate(runs)
        ],
        "choices": [
            {
                "title": choice.title,
                "values": list(choice.values),
                "encodings": {style: charts.colour(choice.colours, style) for style in STYLES},
            }
            for choice in choices
        ],
        "charts": [_chart(chart, axes, choices, has_one_run=len(runs) == 1) for chart in shown],
        "axes": axes.found,
        "sweepCharts": [
            {"name": each.name, "specs": each.specs, "width": each.width, "height": each.height}
            for each in of_sweeps
        ],
    }


class _Axes:
    """Where points lie on steps, tokens and time: once for the metrics of the same lines."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.begun = [
            min((s.times[0] for s in run.curves.values() if s.times), default=0.0) for run in runs
        ]
        self.found: list[dict[str, Sequence[float]]] = []
        self._numbers: dict[tuple[int, tuple[float, ...]], int] = {}

    def number(self, curve: Curve) -> int:
        """Return the place of a curve's own among those found."""
        part, begun = curve.part, self.begun[curve.run]
        key = curve.run, tuple(part.steps)
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            times = [round(time - begun, 1) for time in part.times]
            self.found.append({"steps": part.steps, "tokens": part.tokens, "times": times})
        return self._numbers[key]


def _marks(run: Run) -> list[Mapping[str, Any]]:
    return [
        {"kind": m.kind, "steps": m.step, "tokens": m.tokens, "times": m.time, "text": m.text}
        for m in run.marks
    ]


def _chart(
    chart: Chart, axes: _Axes, choices: Sequence[Choice], *, has_one_run: bool
) -> dict[str, Any]:
    names = list(dict.fromkeys(curve.name for curve in chart.curves))
    colours = Colours(names=names) if has_one_run else choices[0].colours
    y = Axis(chart.panel.unit, format=chart.panel.format)
    specs = {
        style: charts.curves(
            STEPS,
            y,
            colours,
            style=style,
            smoothed=True,
            hovers=True,
            marks=True,
            single_out=not has_one_run,
        )
        for style in STYLES
    }
    return {
        "name": chart.panel.name,
        "smooth": chart.panel.is_noisy,
        "specs": specs,
        "curves": [_curve(curve, axes.number(curve), chart.panel.factor) for curve in chart.curves],
    }


def _curve(curve: Curve, axes: int, factor: float) -> dict[str, Any]:
    part = curve.part
    found: dict[str, Any] = {"run": curve.run, "name": curve.name, "axes": axes}
    found |= {"size": part.size, "means": _rounded(part.means, factor)}
    if part.size > 1:
        found |= {
            "firsts": _rounded(part.firsts, factor),
            "seconds": _rounded(part.seconds, factor),
        }
    return found


def _rounded(values: Sequence[float | None], factor: float) -> list[float | None]:
    """Return values in their unit, with as many digits as a picture can show."""
    return [None if value is None else float(f"{value * factor:.{_DIGITS}g}") for value in values]
