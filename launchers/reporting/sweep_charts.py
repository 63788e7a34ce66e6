"""The charts of a sweep: importances, parallel coordinates, a scatter for each setting. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwright.launchers.reporting.differences import NOT_THERE, short_names
from shardwright.launchers.reporting.facts import Standing, Trial
from shardwright.launchers.reporting.importance import Importance
from shardwright.launchers.reporting.scales import Scale, scale_of
from shardwright.launchers.sweep.definition import Objective
from shardwright.train.charts import charts
from shardwright.train.charts.charts import Axis, Colours, Spec

MOST_AXES = 9
"""Of parallel coordinates: settings behind the first ones leave no room for their names."""
_PIXELS_OF_AN_AXIS = 130


@dataclass(frozen=True)
class SweepChart:
    """A chart that is whole but for its style and size."""

    name: str
    title: str
    specs: dict[str, Spec]
    """For light and dark pages."""
    width: int | None = None
    """The least that it needs; None where it takes what there is."""
    height: int = 260
    is_small: bool = False
    """Whether several stand side by side."""


def sweep_charts(standing: Standing, importances: Sequence[Importance]) -> Iterator[SweepChart]:
    """Yield the charts of a sweep; none of those that would show nothing."""
    settings = standing.settings
    titles = dict(zip(settings, short_names(settings), strict=True))
    for objective, found in zip(standing.sweep.objectives, importances, strict=True):
        metric = objective.metric
        known = [trial for trial in standing.trials if metric in trial.values]
        if found.shares:
            yield _bars(metric, found, titles)
        if settings and len(known) > 1:
            yield _parallel(standing, objective, known, titles)
            for key in settings:
                if with_key := [trial for trial in known if key in trial.point.settings]:
                    yield _scatter(objective, key, with_key, titles)
    if len(standing.sweep.objectives) > 1:
        yield from _against(standing)


def _bars(metric: str, found: Importance, titles: dict[str, str]) -> SweepChart:
    rows = [{"name": titles.get(key, key), "share": v} for key, v in found.shares.items()]
    specs = {s: charts.with_data(charts.bars(style=s), {charts.POINTS: rows}) for s in _STYLES}
    title = f"Which setting mattered for {metric}"
    return SweepChart(f"importance_{metric}", title, specs, height=40 + 28 * len(rows))


_STYLES = ("light", "dark")


def _parallel(
    standing: Standing, objective: Objective, known: Sequence[Trial], titles: dict[str, str]
) -> SweepChart:
    metric = objective.metric
    others = [o.metric for o in standing.sweep.objectives if o.metric != metric]
    columns: dict[str, list[object]] = {
        titles[key]: [trial.point.settings.get(key, NOT_THERE) for trial in known]
        for key in standing.settings[:MOST_AXES]
    }
    for name in (*others, metric):
        if all(name in trial.values for trial in known):
            columns[name] = [trial.values[name] for trial in known]
    scales = {axis: scale_of(values) for axis, values in columns.items()}
    rows = [
        {
            "x": axis,
            "y": scales[axis].place(values[i]),
            "curve": _text(trial, metric),
            "colour": trial.values[metric],
        }
        for i, trial in enumerate(known)
        for axis, values in columns.items()
    ]
    texts = [
        {"x": axis, "y": y, "text": text if len(text) < 15 else f"{text[:13]}…"}
        for axis, values in columns.items()
        for y, text in scales[axis].ticks(values)
    ]
    colours = _colours(metric, known)
    specs = {
        style: charts.with_data(
            charts.parallel(list(columns), colours, style=style),
            {charts.CURVES: rows, charts.TEXTS: texts},
        )
        for style in _STYLES
    }
    width = _PIXELS_OF_AN_AXIS * len(columns)
    title = f"{metric} by settings"
    return SweepChart(f"parallel_{metric}", title, specs, width=width, height=300)


def _scatter(
    objective: Objective, key: str, known: Sequence[Trial], titles: dict[str, str]
) -> SweepChart:
    scale = scale_of([trial.point.settings[key] for trial in known])
    x = Axis(titles[key], is_log=scale.is_log, format="~e" if scale.is_log else ".4~g")
    rows = _rows(objective, known, [_along(t.point.settings[key], scale) for t in known])
    y = Axis(objective.metric, format=".4~g")
    specs = {
        style: charts.with_data(
            charts.scatter(x, y, style=style, names=scale.names), {charts.POINTS: rows}
        )
        for style in _STYLES
    }
    name = f"scatter_{objective.metric}_{titles[key]}".replace("/", "_")
    return SweepChart(name, f"{objective.metric} by {titles[key]}", specs, is_small=True)


def _along(value: object, scale: Scale) -> object:
    return (
        scale.names[round(scale.place(value) * max(1, len(scale.names) - 1))]
        if (scale.names)
        else value
    )


def _rows(
    objective: Objective, known: Sequence[Trial], places: Sequence[object]
) -> list[dict[str, object]]:
    metric = objective.metric
    worth = min if objective.direction == "minimize" else max
    best = worth(trial.values[metric] for trial in known)
    return [
        {
            "x": place,
            "y": trial.values[metric],
            "text": _text(trial, metric),
            "best": trial.values[metric] == best,
        }
        for trial, place in zip(known, places, strict=True)
    ]


def _against(standing: Standing) -> Iterator[SweepChart]:
    """Yield the second objective against the first."""
    first, second, *_ = standing.sweep.objectives
    known = [t for t in standing.trials if {first.metric, second.metric} <= set(t.values)]
    if len(known) < 2:
        return
    x, y = (Axis(each.metric, format=".4~g") for each in (first, second))
    rows = _rows(second, known, [trial.values[first.metric] for trial in known])
    specs = {
        style: charts.with_data(charts.scatter(x, y, style=style), {charts.POINTS: rows})
        for style in _STYLES
    }
    name = f"scatter_{second.metric}_{first.metric}".replace("/", "_")
    yield SweepChart(name, f"{second.metric} by {first.metric}", specs, is_small=True)


def _colours(metric: str, known: Sequence[Trial]) -> Colours:
    return Colours(metric, is_log=scale_of([trial.values[metric] for trial in known]).is_log)


def _text(trial: Trial, metric: str) -> str:
    return f"{trial.point.number}: {trial.point.label} ({metric} {trial.values[metric]:.5g})"
