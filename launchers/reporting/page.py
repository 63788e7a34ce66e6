"""A report as one HTML file that needs nothing else: text, tables and the data of its charts. Pure.

Whatever comes from a run is escaped, and the page's policy lets no script run but its own two, and
nothing be fetched from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from shardwright.launchers.reporting import differences, range_tests
from shardwright.launchers.reporting.curves import Chart, Choice
from shardwright.launchers.reporting.facts import Run, Standing, Trial
from shardwright.launchers.reporting.importance import Importance
from shardwright.launchers.reporting.payload import SMOOTHING
from shardwright.launchers.reporting.range_tests import Tested
from shardwright.launchers.reporting.sweep_charts import SweepChart
from shardwright.train.charts.panels import EVAL_LOSS
from shardwright.train.units import counted

GENERATOR = '<meta name="generator" content="shardwright report">'
"""By which a file is known as a report, which the next one may replace."""
MOST_COLUMNS = 8
"""Settings in a table of runs; all of them are told below it."""
MOST_SIDE_BY_SIDE = 5
"""Runs that have a column each where their settings are compared."""


@dataclass(frozen=True)
class Swept:
    """A sweep as the page tells of it."""

    standing: Standing
    importances: Sequence[Importance]
    charts: Sequence[SweepChart]
    command: str | None
    """That repeats its best point; None where none is done."""


@dataclass(frozen=True)
class Report:
    """Everything that is on a page."""

    title: str
    made: str
    """The moment of which it tells."""
    again: str
    """The command that makes it again."""
    runs: Sequence[Run]
    charts: Sequence[Chart]
    choices: Sequence[Choice]
    sweeps: Sequence[Swept]
    range_tests: Sequence[Tested]
    payload: Mapping[str, Any]


def page(report: Report, library: str) -> str:
    """Return the page; ``library`` is the script of Vega."""
    css, script = (files(__package__).joinpath("assets", name) for name in ("page.css", "page.js"))
    scripts = [library, script.read_text(encoding="utf-8")]
    hashes = " ".join(f"'sha256-{_hash(each)}'" for each in scripts)
    policy = (
        # Vega turns a chart's expressions, which are this program's own, into functions.
        f"default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            GENERATOR,
            '<link rel="icon" href="data:,">',
            f"<title>{escape(report.title)}</title>",
            f"<style>\n{css.read_text(encoding='utf-8')}</style>",
            "</head>",
            "<body>",
            *_body(report),
            f'<script type="application/json" id="data">{_json(report.payload)}</script>',
            *(f"<script>{each}</script>" for each in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(tree: Mapping[str, Any]) -> str:
    """Return JSON that cannot end the element in which it stands."""
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _body(report: Report) -> Iterator[str]:
    yield f"<h1>{escape(report.title)}</h1>"
    yield f'<p class="soft">{counted(len(report.runs), "run")}, as of {escape(report.made)}.</p>'
    if living := [run for run in report.runs if not run.is_over]:
        verb = "was" if len(living) == 1 else "were"
        what = f"{counted(len(living), 'run')} of {len(report.runs):,} {verb}"
        yield (
            f'<p class="live">At that moment {what} not over. '
            f"To see them as they are now: <code>{escape(report.again)}</code></p>"
        )
    in_sweeps = set()
    for number, swept in enumerate(report.sweeps):
        in_sweeps |= {trial.run for trial in swept.standing.trials}
        is_alone = len(report.sweeps) == 1
        title = "Points" if is_alone else f"Sweep {swept.standing.sweep.name}"
        yield from _sweep(swept, report.runs, number, title)
    others = [number for number in range(len(report.runs)) if number not in in_sweeps]
    if others:
        yield from _runs(report, others)
    yield from _range_tests(report.range_tests)
    yield from _curves(report)
    yield from _events(report.runs)
    yield from _configs(report.runs)


# --- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    text: str
    value: float | str | None = None
    """By which it is sorted; None sorts by the text, and nothing comes last."""
    kind: str = ""
    """number, text or the class of a state."""
    html: str | None = None
    """In place of the text."""


_NOTHING = _Cell("", "")


def _table(head: Sequence[str], rows: Iterable[Sequence[_Cell]], best: int | None = None) -> str:
    """Return a table that a click on its head sorts; the first column is of checkboxes."""
    all_rows = list(rows)
    kinds = [
        "number" if any(row[i].kind == "number" for row in all_rows) else ""
        for i in range(len(head))
    ]
    heads = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{escape(name)}</button></th>'
        if name
        else '<th scope="col"><span class="soft">shown</span></th>'
        for name, kind in zip(head, kinds, strict=True)
    )
    lines = [f"<thead><tr>{heads}</tr></thead><tbody>"]
    for number, row in enumerate(all_rows):
        cells = "".join(map(_cell, row))
        lines.append(f'<tr class="best">{cells}</tr>' if number == best else f"<tr>{cells}</tr>")
    return f'<div class="wide tall"><table>{"".join(lines)}</tbody></table></div>'


def _cell(cell: _Cell) -> str:
    value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
    kind = f' class="{cell.kind}"' if cell.kind else ""
    return f"<td{kind}{value}>{cell.html or escape(cell.text)}</td>"


def _number(value: float | None, text: str = ".5g") -> _Cell:
    return _NOTHING if value is None else _Cell(f"{value:{text}}", value, "number")


def _setting(value: str) -> _Cell:
    try:
        return _Cell(value, float(value), "number")
    except ValueError:
        return _Cell(value)


def _shown(number: int | None, label: str) -> _Cell:
    if number is None:
        return _NOTHING
    named = escape(f"show {label}", quote=True)
    box = f'<input type="checkbox" checked data-run="{number}" aria-label="{named}">'
    return _Cell("", html=box)


def _state(text: str, word: str) -> _Cell:
    kind = {"done": "good", "failed": "bad", "dead": "bad", "unreadable": "bad"}.get(word, "")
    kind = "live" if word in ("running", "preparing", "starting", "waiting") else kind
    return _Cell(text, kind=f"text {kind}".strip())


_OF_RUNS = ("step", "training loss", "tokens/s")


def _of_run(run: Run | None) -> list[_Cell]:
    if run is None:
        return [_NOTHING] * len(_OF_RUNS)
    of = "" if run.total_steps is None else f" of {run.total_steps:,}"
    step = _NOTHING if run.step is None else _Cell(f"{run.step:,}{of}", run.step, "number")
    return [step, _number(run.last("loss")), _number(run.last("tokens_per_second"), ",.0f")]


CHOOSE = (
    '<p class="choose"><button type="button" data-choose="all">Show all curves</button> '
    '<button type="button" data-choose="none">Show none</button></p>'
)


def _runs(report: Report, numbers: Sequence[int]) -> Iterator[str]:
    runs = [report.runs[number] for number in numbers]
    varied = differences.differing([run.settings for run in runs])
    keys = list(varied)[:MOST_COLUMNS]
    names = differences.short_names(keys)
    head = ["", "run", "state", *_OF_RUNS[:2], "held-out loss", "lowest", _OF_RUNS[2], *names]
    rows = []
    for place, (number, run) in enumerate(zip(numbers, runs, strict=True)):
        step, loss, speed = _of_run(run)
        rows.append(
            [
                _shown(number, run.label),
                _Cell(run.label, kind="text"),
                _state(run.state, run.word),
                *(step, loss, _number(run.last(EVAL_LOSS)), _number(run.lowest(EVAL_LOSS)), speed),
                *(_setting(varied[key][place]) for key in keys),
            ]
        )
    if len(report.runs) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    yield f"<section><h2>{'Runs' if len(runs) > 1 else 'Run'}</h2>"
    if len(runs) > 1:
        yield CHOOSE
    yield f"{_table(head, rows)}</section>"


# --- sweeps ---------------------------------------------------------------------------------------


def _sweep(swept: Swept, runs: Sequence[Run], number: int, title: str) -> Iterator[str]:
    standing = swept.standing
    objectives = standing.sweep.objectives
    wanted = " and ".join(f"{o.metric}, {o.direction}d" for o in objectives)
    yield f"<section><h2>{escape(title)}</h2>"
    yield (
        f'<p class="soft">{escape(standing.path)}: {escape(_counts(standing.trials))}; '
        f"objective {escape(wanted)}.</p>"
    )
    best, metric = standing.best, objectives[0].metric
    is_whole = all(trial.state.is_over for trial in standing.trials)
    so_far = "" if is_whole else " so far"
    if best is not None and swept.command is not None:
        yield (
            f"<p>Best{so_far} is point {best.point.number} with {escape(metric)} "
            f"<strong>{best.values[metric]:.5g}</strong>. The command that runs it again:</p>"
            f'<div class="command"><pre id="command-{number}">{escape(swept.command)}</pre>'
            f'<button type="button" data-copies="command-{number}">Copy</button></div>'
        )
    else:
        yield '<p class="live">No point is done yet, and none is the best.</p>'
    if failed := [trial for trial in standing.trials if trial.state.state == "failed"]:
        yield f'<p class="bad">{counted(len(failed), "point")} failed:</p><ul>'
        for trial in sorted(failed, key=lambda t: t.point.number):
            why = (trial.state.why or "the sweep has not noted why").partition("\n")[0]
            yield f"<li>{trial.point.number}: {escape(trial.point.label)}: {escape(why)}</li>"
        yield "</ul>"
    yield from (CHOOSE, _points(standing, runs), "</section>")
    yield from _sweep_charts(swept)


def _counts(trials: Sequence[Trial]) -> str:
    states = [trial.state.state for trial in trials]
    each = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    return f"{counted(len(trials), 'point')}" + (f", {each}" if each else "")


def _points(standing: Standing, runs: Sequence[Run]) -> str:
    objectives, settings = standing.sweep.objectives, standing.settings
    head = ["", "point", *(o.metric for o in objectives), *differences.short_names(settings)]
    head += ["state", *_OF_RUNS]
    rows, best_place = [], None
    for place, trial in enumerate(standing.trials):
        run = None if trial.run is None else runs[trial.run]
        given = trial.point.settings
        if trial is standing.best:
            best_place = place
        rows.append(
            [
                _shown(trial.run, "" if run is None else run.label),
                _Cell(str(trial.point.number), trial.point.number, "number"),
                *(_number(trial.values.get(o.metric)) for o in objectives),
                *(
                    _setting(differences.written(given[key])) if key in given else _NOTHING
                    for key in settings
                ),
                _state(trial.state.state, trial.state.state),
                *_of_run(run),
            ]
        )
    return _table(head, rows, best_place)


def _sweep_charts(swept: Swept) -> Iterator[str]:
    for objective, found in zip(swept.standing.sweep.objectives, swept.importances, strict=True):
        text = found.how if found.shares else f"Which setting mattered is not known: {found.how}"
        yield f"<h3>Settings and {escape(objective.metric)}</h3>"
        yield f'<p class="soft">{escape(text)}</p>'
    for is_small in (False, True):
        shown = [chart for chart in swept.charts if chart.is_small == is_small]
        if shown:
            yield f'<div class="charts{" small" if is_small else ""}">'
            yield from (
                _figure(
                    chart.name,
                    chart.title,
                    whole=not is_small,
                    height=chart.height,
                    scrolls=chart.width is not None,
                )
                for chart in shown
            )
            yield "</div>"


def _figure(
    name: str, title: str, *, whole: bool = False, height: int = 250, scrolls: bool = False
) -> str:
    kind = ' class="whole"' if whole else ""
    inner = "chart scrolls" if scrolls else "chart"
    return (
        f"<figure{kind}><figcaption>{escape(title)}</figcaption>"
        f'<div class="{inner}" id="chart-{escape(name)}" style="min-height: {height}px"></div>'
        "</figure>"
    )


# --- curves ---------------------------------------------------------------------------------------


def _range_tests(tests: Sequence[Tested]) -> Iterator[str]:
    if not tests:
        return
    yield "<section><h2>Range test</h2>"
    yield from (f"<p>{escape(text)}</p>" for text in range_tests.told(tests))
    yield '<p class="soft">The rate rises by the same factor each step. Where the loss falls '
    yield "fastest is a rate to train with; where it rises is one that is too high. What was "
    yield 'logged lies pale behind the smoothed loss.</p><div class="charts">'
    chart = range_tests.chart(tests)
    yield _figure(chart.name, chart.title, whole=True, height=chart.height)
    yield "</div></section>"


def _curves(report: Report) -> Iterator[str]:
    yield "<section><h2>Curves</h2>"
    if not report.charts:
        yield "<p>Nothing has been logged yet that a curve could show.</p></section>"
        return
    yield "<noscript><p>The curves need JavaScript, and the tables do not. "
    yield "<code>--png DIR</code> draws them as pictures.</p></noscript>"
    yield from _controls(report)
    yield f'<p class="soft">{escape(thinning_told(report.charts))} Triangles are checkpoints that '
    yield "are kept, dashed lines restarts, yellow diamonds spikes, red crosses values that are "
    yield "not finite, where the curve has a gap. On a logarithmic axis what is 0 or less is left "
    yield "out.</p>"
    yield '<div class="charts">'
    yield from (_figure(chart.panel.name, chart.panel.title) for chart in report.charts)
    yield "</div></section>"


def thinning_told(charts: Sequence[Chart]) -> str:
    """Say what of the logged points is drawn. Pure."""
    curves = [curve for chart in charts for curve in chart.curves]
    points = sum(curve.points for curve in curves)
    largest = max(curve.part.size for curve in curves)
    if largest == 1:
        return f"Each of {counted(points, 'logged point')} is drawn."
    groups = sum(len(curve.part.means) for curve in curves)
    return (
        f"{points:,} points were logged, and {groups:,} groups of up to {largest} neighbours are "
        "drawn: unsmoothed through the lowest and the highest of each group, so that no peak is "
        "lost; smoothed, of the mean of each."
    )


def _controls(report: Report) -> Iterator[str]:
    state = report.payload["state"]
    yield '<div class="controls" role="group" aria-label="Curves">'
    yield (
        '<label>over <select id="x"><option value="steps">steps</option>'
        '<option value="tokens">tokens</option><option value="times">time</option></select></label>'
    )
    yield (
        f'<label>smoothing <input type="range" id="smoothing" min="0" max="{len(SMOOTHING) - 1}" '
        f'step="1" value="{state["smoothing"]}"> <output id="smoothing-told"></output></label>'
    )
    yield '<label><input type="checkbox" id="log-x"> log x</label>'
    yield '<label><input type="checkbox" id="log-y"> log y</label>'
    checked = " checked" if state["marks"] else ""
    yield f'<label><input type="checkbox" id="marks"{checked}> '
    yield "restarts, checkpoints, spikes</label>"
    if report.choices:
        yield '<label>colour is <select id="colour">'
        for number, choice in enumerate(report.choices):
            yield f'<option value="{number}">{escape(choice.title)}</option>'
        yield "</select></label>"
    yield "</div>"


def _events(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what happened to runs: in words, and without a script."""
    rows = [
        [_Cell(run.label, kind="text"), _Cell(mark.kind), _number(mark.step, ","), _Cell(mark.text)]
        for run in runs
        for mark in run.marks
    ]
    if not rows:
        return
    yield "<details><summary>Restarts, checkpoints and values that are not finite "
    yield f"({len(rows):,})</summary>{_table(['run', 'what', 'step', 'how'], rows)}</details>"


# --- configs --------------------------------------------------------------------------------------


def _configs(runs: Sequence[Run]) -> Iterator[str]:
    for title, of_runs in (
        ("Configuration", [run.settings for run in runs]),
        ("Data", [run.data for run in runs]),
        ("Versions and hardware", [run.versions for run in runs]),
    ):
        known = [each for each in of_runs if each]
        if not known:
            continue
        yield f"<section><h2>{title}</h2>"
        if len(runs) > 1:
            yield from _differences(runs, of_runs)
        common = differences.shared(known)
        whose = f"what all {len(known)} runs have in common" if len(known) > 1 else "as it is"
        rows = [[_Cell(key), _Cell(value, kind="text")] for key, value in common.items()]
        yield f"<details><summary>{len(common):,} settings, {whose}</summary>"
        yield f"{_table(['setting', 'value'], rows)}</details></section>"


def _differences(runs: Sequence[Run], settings: Sequence[Mapping[str, str]]) -> Iterator[str]:
    varied = differences.differing(settings)
    if not varied:
        yield "<p>There is no difference.</p>"
    elif len(runs) <= MOST_SIDE_BY_SIDE:
        rows = [
            [_Cell(key), *(_Cell(value, kind="text") for value in values)]
            for key, values in varied.items()
        ]
        yield f"<h3>What differs</h3>{_table(['setting', *(run.label for run in runs)], rows)}"
    else:
        rows = []
        for key, values in varied.items():
            shares = sorted({v: values.count(v) for v in values}.items(), key=lambda s: -s[1])
            told = "; ".join(f"{value} ({count})" for value, count in shares[:12])
            told += f"; {len(shares) - 12} more" if len(shares) > 12 else ""
            rows.append([_Cell(key), _number(len(shares), "d"), _Cell(told, kind="text")])
        head = ["setting", "values", "each with how many runs have it"]
        yield f"<h3>What differs</h3>{_table(head, rows)}"
