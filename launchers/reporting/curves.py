"""The curves of a report's charts, and what their colours may mean. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.launchers.reporting import differences
from shardwright.launchers.reporting.facts import Run, Standing
from shardwright.launchers.reporting.scales import is_number, scale_of
from shardwright.train.charts.charts import MOST_NAMED, Colours
from shardwright.train.charts.panels import Panel, curve_name, panels
from shardwright.train.charts.thinning import Thinned, points_each, thinned

MOST_CHOICES = 12


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    run: int
    name: str
    """What it is called: its run, or of a single run its metric."""
    points: int
    """How many were logged."""
    part: Thinned


@dataclass(frozen=True)
class Chart:
    """A chart with the curves that it shows."""

    panel: Panel
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Choice:
    """What the colour of a curve may mean."""

    title: str
    colours: Colours
    values: Sequence[Any]
    """For each run its colour's name or number; None where it has none."""


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of runs, thinned to what can be drawn at once."""
    logged = dict.fromkeys(name for run in runs for name in run.curves)
    most = points_each(sum(bool(run.curves) for run in runs))
    found = []
    for panel in panels(logged, one_run=len(runs) == 1):
        curves = [
            Curve(
                number,
                curve_name(metric) if len(runs) == 1 else run.label,
                len(run.curves[metric].values),
                thinned(run.curves[metric], most),
            )
            for number, run in enumerate(runs)
            for metric in panel.metrics
            if metric in run.curves and run.curves[metric].finite
        ]
        if curves:
            found.append(Chart(panel, curves))
    return found


def choices(runs: Sequence[Run], standings: Sequence[Standing]) -> list[Choice]:
    """Return what colours may mean where there are several runs, the first by default."""
    if len(runs) < 2:
        return []
    found = []
    labels = [run.label for run in runs]
    if len(runs) <= MOST_NAMED:
        found.append(Choice("run", Colours(names=labels), labels))
    found += _objectives(runs, standings)
    if not any(each.title == "loss" for each in found):
        found += _ramp("training loss at the end", [run.last("loss") for run in runs])
    varied = differences.differing([run.settings for run in runs])
    varied.pop("name", None)
    for key, title in zip(varied, differences.short_names(list(varied)), strict=True):
        found += _of_setting(title, varied[key])
    order = Choice("order of the runs", Colours("order of the runs"), list(range(len(runs))))
    return [*found[: MOST_CHOICES - 1], order]


def _objectives(runs: Sequence[Run], standings: Sequence[Standing]) -> Iterator[Choice]:
    for metric in dict.fromkeys(o.metric for s in standings for o in s.sweep.objectives):
        values: list[float | None] = [None] * len(runs)
        for trial in (trial for standing in standings for trial in standing.trials):
            if trial.run is not None:
                values[trial.run] = trial.values.get(metric)
        yield from _ramp(metric, values)


def _ramp(title: str, values: Sequence[Any]) -> Iterable[Choice]:
    there = [value for value in values if value is not None]
    if len(set(there)) > 1:
        yield Choice(title, Colours(title, is_log=scale_of(there).is_log), list(values))


def _of_setting(title: str, values: Sequence[str]) -> Iterable[Choice]:
    numbers = [_number(value) for value in values]
    if all(is_number(number) for number in numbers):
        return _ramp(title, numbers)
    names = list(dict.fromkeys(values))
    if len(names) > MOST_NAMED:
        return ()
    return (Choice(title, Colours(title, names=names), list(values)),)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
