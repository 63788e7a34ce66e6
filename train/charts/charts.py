"""Charts as Vega-Lite: the same for a page, where their data are put in, and for a picture. Pure.

Fields have names of their own, which no name of a run, a setting or a metric can be part of: these
are values and titles alone, as Vega reads expressions in some of the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.train.charts.series import Series
from shardwright.train.charts.thinning import line, thinned

Spec = dict[str, Any]
Row = Mapping[str, Any]

# Told apart by people who do not see all colours: after Okabe and Ito, and darker or lighter where
# theirs are hard to see on the ground.
PALETTES = {
    "light": ["#0072b2", "#d55e00", "#008a63", "#b8568f", "#8a6d00", "#222222"],
    "dark": ["#56b4e9", "#ff9655", "#33cc9f", "#eba5cc", "#f0e442", "#ffffff"],
}
MOST_NAMED = len(PALETTES["light"])
"""Curves that have a colour and a line of the legend to themselves."""
# Of viridis what is seen on the ground.
RAMPS = {"light": [0.0, 0.85], "dark": [0.25, 1.0]}
GROUNDS = {"light": "#ffffff", "dark": "#0d1117"}
_INKS = {"light": ("#1f2328", "#d9dce1", "#8c959f"), "dark": ("#e6e8eb", "#3a4048", "#8b949e")}
CURVES, RAW, POINTS, TEXTS = "curves", "raw", "points", "texts"
"""The data that a spec refers to by name."""
RESTART, CHECKPOINT, NOT_FINITE, SPIKE = "restart", "checkpoint", "not finite", "spike"
MARKS = (RESTART, CHECKPOINT, NOT_FINITE, SPIKE)
"""Likewise: what may be marked on the curves of runs."""
FONT = "system-ui, 'Liberation Sans', Arial, sans-serif"


def theme(name: str, *, ground: str | None = None) -> Spec:
    """Return Vega-Lite's config for light or dark pages; no ``ground`` is the page's own."""
    ink, grid, axis = _INKS[name]
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": ground or "transparent",
        "font": FONT,
        "padding": 6,
        "view": {"stroke": None},
        "axis": {
            **text,
            "titleFontWeight": "normal",
            "gridColor": grid,
            "domainColor": axis,
            "tickColor": axis,
            "labelOverlap": "greedy",
            "labelLimit": 110,
        },
        "legend": {**text, "titleFontWeight": "normal", "labelLimit": 420, "symbolStrokeWidth": 3},
        "title": {"color": ink, "fontSize": 14, "anchor": "start", "fontWeight": 600},
        "rule": {"color": axis},
        "text": {"color": ink},
        "range": {"category": PALETTES[name]},
    }


@dataclass(frozen=True)
class Colours:
    """What the colour of a curve or a point means."""

    title: str | None = None
    names: Sequence[str] = ()
    """A colour for each of these; without them a colour is a number on a ramp."""
    is_log: bool = False
    legend: bool = True


def colour(colours: Colours, name: str) -> Spec:
    """Return the encoding of the field ``colour``; null is a curve that has none, and is grey."""
    grey = {"test": "datum.colour === null", "value": "#8b949e"}
    missing: Spec = {"condition": grey}
    if colours.names:
        shown = {"orient": "top", "title": colours.title, "columns": 1 if _long(colours) else 0}
        shown |= {"symbolType": "stroke", "symbolOpacity": 1}
        return {
            **missing,
            "field": "colour",
            "type": "nominal",
            "scale": {"domain": list(colours.names), "range": PALETTES[name]},
            "legend": shown if colours.legend else None,
        }
    scale: Spec = {"scheme": {"name": "viridis", "extent": RAMPS[name]}}
    return {
        **missing,
        "field": "colour",
        "type": "quantitative",
        "scale": {**scale, "type": "log"} if colours.is_log else scale,
        "legend": {
            "title": colours.title,
            "orient": "top",
            "type": "gradient",
            "gradientLength": 160,
            "format": ".4~g",
        }
        if colours.legend
        else None,
    }


def _long(colours: Colours) -> bool:
    return sum(map(len, colours.names)) > 60


@dataclass(frozen=True)
class Axis:
    """One axis of a chart."""

    title: str
    is_log: bool = False
    format: str = "~s"
    """By d3's rules; SI prefixes."""
    is_count: bool = False

    @property
    def ticks(self) -> Spec:
        return {"tickMinStep": 1} if self.is_count else {}

    def encoded(self, field: str) -> Spec:
        """Return the encoding of a field, x or y."""
        return {
            "field": field,
            "type": "quantitative",
            "title": self.title,
            "axis": {"format": self.format, "tickCount": 6, **self.ticks},
            "scale": {"type": "log"} if self.is_log else {"zero": False, "nice": field == "y"},
        }


STEPS = Axis("step", is_count=True)


def curves(
    x: Axis,
    y: Axis,
    colours: Colours,
    *,
    style: str = "light",
    smoothed: bool = False,
    dots: bool = False,
    hovers: bool = False,
    marks: bool = False,
    single_out: bool = False,
) -> Spec:
    """Return a chart of curves, to whose data ``curves`` rows of x, y, curve and colour belong.

    ``raw`` are those behind smoothed ones, ``points`` those that answer a pointer; each of
    ``MARKS`` has x and text. Many curves are told apart as the pointer singles one out.
    """
    place = {"x": x.encoded("x"), "y": y.encoded("y")}
    whole = {**place, "detail": {"field": "curve"}, "color": colour(colours, style)}
    layers: list[Spec] = []
    if smoothed:
        pale = {"type": "line", "strokeWidth": 1, "opacity": 0.25, "tooltip": None}
        layers.append({"data": {"name": RAW}, "mark": pale, "encoding": whole})
    strong: Spec = {"type": "line", "strokeWidth": 1.8, "strokeJoin": "round", "clip": True}
    drawn: Spec = {
        "data": {"name": CURVES},
        "mark": {**strong, "point": {"size": 22} if dots else False},
        "encoding": whole,
    }
    layers.append({**drawn, **_singled_out(whole)} if single_out else drawn)
    if hovers:
        layers.append(_pointed_at(place, y, colour(colours, style)))
    if marks:  # above what answers a pointer, which would hide their own answers
        layers += _marks()
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "layer": layers}


def _singled_out(encoding: Spec, pale: float = 0.12) -> Spec:
    """Return what of a layer of lines makes all but the one below the pointer pale."""
    over = {"type": "point", "fields": ["curve"], "on": "pointerover", "clear": "pointerout"}
    opacity = {"condition": {"param": "over", "value": 1}, "value": pale}
    return {
        "params": [{"name": "over", "select": over}],
        "encoding": {**encoding, "opacity": opacity, "tooltip": {"field": "curve"}},
    }


def _marks() -> list[Spec]:
    """Return the layers of restarts, checkpoints, values that are no numbers, and spikes."""
    at = {"x": {"field": "x", "type": "quantitative"}, "tooltip": {"field": "text"}}
    rule = {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.5}
    triangle = {"type": "point", "shape": "triangle-up", "size": 70, "filled": True}
    triangle |= {"yOffset": -5, "opacity": 1}
    cross = {"type": "point", "shape": "cross", "size": 70, "color": "#d1242f", "filled": True}
    cross |= {"yOffset": -5, "opacity": 1}
    diamond = {**cross, "shape": "diamond", "color": "#bf8700"}
    bottom = {**at, "y": {"value": "height"}}
    kinds = (
        (RESTART, rule, at),
        (CHECKPOINT, triangle, bottom),
        (NOT_FINITE, cross, bottom),
        (SPIKE, diamond, bottom),
    )
    return [
        {"data": {"name": name}, "mark": {"color": "#8b949e", **mark}, "encoding": encoding}
        for name, mark, encoding in kinds
    ]


def _pointed_at(place: Spec, y: Axis, colour: Spec) -> Spec:
    """Return the layer that shows the values of the point that is nearest to the pointer."""
    nearest = {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"}
    return {
        "data": {"name": POINTS},
        "params": [{"name": "nearest", "select": nearest}],
        "mark": {"type": "point", "filled": True, "size": 60},
        "encoding": {
            **place,
            "color": colour,
            "opacity": {"condition": {"param": "nearest", "empty": False, "value": 1}, "value": 0},
            "tooltip": {"value": {"expr": _told(place["x"]["title"], y.title or "value")}},
        },
    }


def _told(along: str, up: str) -> str:
    """Return an expression of Vega's for what is told of the point in whose cell a pointer is.

    As fields of a tooltip its words would be looked for in the cell (vega-lite 6.4, nearest).
    """
    numbers = ((along, "x", ",.6~r"), (up, "y", ".6~g"))
    told = [f"{json.dumps(name)}: format(datum.datum.{at}, '{f}')" for name, at, f in numbers]
    told.insert(0, '"curve": datum.datum.curve')
    return f"datum.datum ? {{{', '.join(told)}}} : null"  # a point itself is not in a cell


def scatter(x: Axis, y: Axis, *, style: str, names: Sequence[str] = ()) -> Spec:
    """Return a chart of points, rows of x, y and text; ``names`` are those of x where it is words.

    The best one has ``best`` and a ring.
    """
    along: Spec = {"field": "x", "type": "nominal", "title": x.title, "sort": list(names)}
    numbers = x.encoded("x")
    numbers["scale"] |= {"padding": 12, "nice": False}
    along["axis"] = {"labelAngle": 0 if sum(map(len, names)) < 24 else -40}
    encoding = {
        "x": along if names else numbers,
        "y": y.encoded("y"),
        "tooltip": [{"field": "text", "title": "point"}, {"field": "y", "title": y.title}],
    }
    dot = {"type": "point", "filled": True, "size": 70, "color": PALETTES[style][0]}
    ring = {"type": "point", "size": 190, "strokeWidth": 2, "color": _INKS[style][0]}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"name": POINTS},
        "layer": [
            {"mark": dot, "encoding": encoding},
            {
                "transform": [{"filter": {"field": "best", "equal": True}}],
                "mark": ring,
                "encoding": {key: encoding[key] for key in ("x", "y")},
            },
        ],
    }


def parallel(axes: Sequence[str], colours: Colours, *, style: str) -> Spec:
    """Return parallel coordinates: ``curves`` are rows of x (an axis), y from 0 to 1 and curve.

    ``texts`` are the labels along the axes.
    """
    along: Spec = {
        "field": "x",
        "type": "nominal",
        "sort": list(axes),
        "title": None,
        "axis": {"labelAngle": 0, "domain": False, "ticks": False, "orient": "top", "grid": True},
        "scale": {"type": "point", "padding": 0.5},
    }
    up = {"field": "y", "type": "quantitative", "axis": None, "scale": {"domain": [-0.04, 1.06]}}
    lines: Spec = {
        "x": along,
        "y": up,
        "detail": {"field": "curve"},
        "color": colour(colours, style),
    }
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "layer": [
            {
                "data": {"name": CURVES},
                "mark": {"type": "line", "strokeWidth": 2},
                **_singled_out(lines),
            },
            # Readable above lines: first as a band of the ground's colour, then as text.
            *(
                {
                    "data": {"name": TEXTS},
                    "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 11, **mark},
                    "encoding": {"x": along, "y": up, "text": {"field": "text"}},
                }
                for mark in ({"stroke": GROUNDS[style], "strokeWidth": 4, "opacity": 0.9}, {})
            ),
        ],
    }


def bars(*, style: str) -> Spec:
    """Return a chart of shares, rows of name and share, the largest first."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"name": POINTS},
        "mark": {"type": "bar", "color": PALETTES[style][0], "tooltip": True},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "sort": "-x", "title": None},
            "x": {
                "field": "share",
                "type": "quantitative",
                "title": "share of the importance",
                "axis": {"format": "%", "tickCount": 5},
                "scale": {"domainMin": 0},
            },
        },
    }


def with_data(spec: Spec, data: Mapping[str, Sequence[Row]], **given: Any) -> Spec:
    """Return a spec that is whole, with its data and whatever else it is ``given``.

    Layers without data are left out: Vega warns of axes that end nowhere.
    """
    layers = [
        layer
        for layer in spec.get("layer", ())
        if "data" not in layer or data.get(layer["data"]["name"])
    ]
    whole = {**spec, "layer": layers} if layers else spec
    return {**whole, "datasets": {name: list(rows) for name, rows in data.items()}, **given}


_FEW_POINTS = 40
_SMOOTHING = 0.01


def losses(training: Series | None, held_out: Series | None) -> Spec | None:
    """Return the picture of a run's losses over its steps; None where no line can be drawn."""
    given = {"training loss": training, "evaluation loss": held_out}
    there = {name: series for name, series in given.items() if series and series.finite}
    if max((len(series.finite) for series in there.values()), default=0) < 2:
        return None
    longest = max(len(series.values) for series in there.values())
    share = _SMOOTHING if longest > _FEW_POINTS else 0.0
    spec = curves(
        STEPS,
        Axis("loss", format="~r"),
        Colours(names=list(there)),
        smoothed=share > 0,
        dots=longest <= _FEW_POINTS,
    )
    return with_data(
        spec,
        {CURVES: _rows(there, share), RAW: _rows(there, 0.0) if share else []},
        width=640,
        height=280,
        description="Loss over the steps of the training",
        config=theme("light", ground="#ffffff"),
    )


def _rows(lines: Mapping[str, Series], share: float) -> list[Row]:
    return [
        {"x": x, "y": y, "curve": name, "colour": name}
        for name, part in ((name, thinned(series)) for name, series in lines.items())
        for x, y in line(part.steps, part, share)
    ]
