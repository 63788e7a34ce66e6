"""The loss over the learning rate, of runs whose rate rises to be tested. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression

from shardwright.launchers.reporting.facts import Run
from shardwright.launchers.reporting.sweep_charts import SweepChart
from shardwright.train.charts import charts
from shardwright.train.charts.charts import CURVES, RAW, Axis, Colours, Row

NAME = "loss_over_learning_rate"
_SETTING, _VALUE = "trainer.lr_scheduler", "range_test"
_SHARE = 0.04
"""Of a curve's length, over which losses are smoothed on each side of a point."""
_STYLES = ("light", "dark")


@dataclass(frozen=True)
class Tested:
    """The range test of one run."""

    label: str
    rates: Sequence[float]
    losses: Sequence[float]
    smooth: Sequence[float]

    @property
    def fastest(self) -> float | None:
        """The rate at which the loss falls fastest over the rate's logarithm, by lines through the
        neighbours of each; None where it falls nowhere."""
        half, logs = _half(len(self.rates)), [math.log(rate) for rate in self.rates]
        slopes = []
        for middle in range(half, len(logs) - half):
            near = slice(middle - half, middle + half + 1)
            if logs[near.start] < logs[middle + half]:
                line = linear_regression(logs[near], self.losses[near])
                slopes.append((line.slope, self.rates[middle]))
        slope, rate = min(slopes, default=(0.0, 0.0))
        return rate if slope < 0 else None

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss is lowest."""
        return min(zip(self.smooth, self.rates, strict=True))[1]


def tested(runs: Sequence[Run]) -> list[Tested]:
    """Return the range tests among runs, of those steps that have logged a loss and a rate."""
    found = []
    for run in runs:
        if run.settings.get(_SETTING) != _VALUE or not {"loss", "learning_rate"} <= set(run.curves):
            continue
        rates = dict(run.curves["learning_rate"].finite)
        points = [(rates[s], v) for s, v in run.curves["loss"].finite if rates.get(s, 0.0) > 0]
        if len(points) > 1:
            points.sort(key=lambda point: point[0])
            at, losses = zip(*points, strict=True)
            found.append(Tested(run.label, at, losses, _smoothed(losses)))
    return found


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Return the mean of each loss and its neighbours on both sides: none lags behind its rate."""
    half = _half(len(losses))
    return [fmean(losses[max(0, at - half) : at + half + 1]) for at in range(len(losses))]


def _half(points: int) -> int:
    return max(1, round(_SHARE * points))


def chart(tests: Sequence[Tested]) -> SweepChart:
    """Return the chart of range tests, of which there is one at least."""
    names = [each.label for each in tests]
    colours = Colours(names=names, legend=len(names) > 1)
    x, y = Axis("learning rate", is_log=True, format="~e"), Axis("training loss", format=".4~g")
    data = {RAW: list(_rows(tests, "losses")), CURVES: list(_rows(tests, "smooth"))}
    specs = {
        style: charts.with_data(charts.curves(x, y, colours, style=style, smoothed=True), data)
        for style in _STYLES
    }
    return SweepChart(NAME, "Training loss over learning rate", specs, height=320)


def _rows(tests: Sequence[Tested], name: str) -> Iterator[Row]:
    for each in tests:
        for rate, loss in zip(each.rates, getattr(each, name), strict=True):
            yield {"x": rate, "y": loss, "curve": each.label, "colour": each.label}


def told(tests: Sequence[Tested]) -> Iterator[str]:
    """Yield for each range test where its smoothed loss falls fastest, and where it is lowest."""
    for each in tests:
        whose = f"{each.label}: the" if len(tests) > 1 else "The"
        fastest = each.fastest
        falls = "never falls" if fastest is None else f"falls fastest at {fastest:.2g}"
        yield f"{whose} smoothed loss {falls} and is lowest at {each.lowest:.2g}."
