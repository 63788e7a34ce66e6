"""The charts of a report as PNGs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers.reporting.curves import Chart, Choice
from shardwright.launchers.reporting.facts import Run
from shardwright.launchers.reporting.payload import SMOOTHING
from shardwright.launchers.reporting.sweep_charts import SweepChart
from shardwright.train.charts import charts, drawing
from shardwright.train.charts.charts import CURVES, MARKS, RAW, STEPS, Axis, Colours, Row, Spec
from shardwright.train.charts.thinning import line

_WIDTH, _HEIGHT = 760, 340
_STYLE = "light"


def write(directory: Path, specs: Iterable[tuple[str, Spec]]) -> list[Path]:
    """Draw charts into a directory, each under its name; return the files."""
    named = list(specs)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for (name, _), png in zip(named, drawing.pngs([spec for _, spec in named]), strict=True):
        written.append(directory / f"{file_name(name)}.png")
        written[-1].write_bytes(png)
    return written


def file_name(name: str) -> str:
    """Return a name for a file, of a metric or a setting of any name. Pure."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or "chart"


def pictures(
    shown: Sequence[Chart],
    choices: Sequence[Choice],
    of_sweeps: Iterable[SweepChart],
    runs: Sequence[Run],
    state: Mapping[str, Any],
) -> Iterator[tuple[str, Spec]]:
    """Yield the charts of a page as it opens, each with its name and as a whole. Pure."""
    theme = charts.theme(_STYLE, ground="#ffffff")
    for chart in shown:
        share = SMOOTHING[state["smoothing"]] if chart.panel.is_noisy else 0.0
        marks = _marks(runs) if state["marks"] else {}
        spec = _curves(chart, choices[0] if choices else None, share, marks)
        size = {"width": _WIDTH, "height": _HEIGHT}
        yield chart.panel.name, {**spec, "title": chart.panel.title, **size, "config": theme}
    for each in of_sweeps:
        size = {"width": max(each.width or 0, 360 if each.is_small else _WIDTH)}
        size["height"] = each.height
        yield each.name, {**each.specs[_STYLE], "title": each.title, **size, "config": theme}


def _marks(runs: Sequence[Run]) -> dict[str, list[Row]]:
    marks = [mark for run in runs for mark in run.marks]
    return {
        kind: [{"x": mark.step, "text": mark.text} for mark in marks if mark.kind == kind]
        for kind in MARKS
    }


def _curves(
    chart: Chart, choice: Choice | None, share: float, marks: Mapping[str, Sequence[Row]]
) -> Spec:
    names = list(dict.fromkeys(curve.name for curve in chart.curves))
    few = choice is None or bool(choice.colours.names)
    spec = charts.curves(
        STEPS,
        Axis(chart.panel.unit, format=chart.panel.format),
        choice.colours if choice else Colours(names=names),
        smoothed=True,
        marks=True,
        dots=max(len(curve.part.means) for curve in chart.curves) <= 40,
    )
    raw = list(_rows(chart, choice, 0.0)) if share > 0 and few else []
    return charts.with_data(spec, {CURVES: list(_rows(chart, choice, share)), RAW: raw, **marks})


def _rows(chart: Chart, choice: Choice | None, share: float) -> Iterator[Row]:
    for curve in chart.curves:
        colour = choice.values[curve.run] if choice else curve.name
        for x, y in line(curve.part.steps, curve.part, share):
            value = None if y is None else y * chart.panel.factor
            yield {"x": x, "y": value, "curve": curve.name, "colour": colour}
