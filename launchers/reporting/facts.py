"""What a report tells of runs and sweeps, read from their directories; nothing is written there."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwright.launchers import runs
from shardwright.launchers.columns import seen_from
from shardwright.launchers.reporting import differences
from shardwright.launchers.sweep import directory
from shardwright.launchers.sweep.definition import Objective
from shardwright.launchers.sweep.directory import Point, PointState, Sweep
from shardwright.launchers.watching import differences as watched
from shardwright.train import config as run_config
from shardwright.train.charts import series
from shardwright.train.charts.charts import CHECKPOINT, NOT_FINITE, SPIKE
from shardwright.train.charts.series import Series
from shardwright.train.checkpoint.format import layout
from shardwright.train.errors import UserError
from shardwright.train.run_directory import history, metrics
from shardwright.train.run_directory.names import CHECKPOINTS, METRICS, RUN_CONFIG


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    kind: str
    """One of `charts.MARKS`."""
    step: int
    text: str
    tokens: float = 0.0
    time: float = 0.0


@dataclass(frozen=True)
class Run:
    """One run, as it was when it was looked at; empty where it has nothing yet."""

    path: str
    """As it is seen from where the report is made."""
    label: str
    state: str
    word: str = runs.UNREADABLE
    """The state in one word."""
    is_over: bool = True
    step: int | None = None
    total_steps: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Series] = field(default_factory=dict)
    marks: Sequence[Mark] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of its last start: versions and hardware."""
    data: Mapping[str, str] = field(default_factory=dict)
    """What it trains on."""

    def last(self, metric: str) -> float | None:
        finite = self.curves[metric].finite if metric in self.curves else []
        return finite[-1][1] if finite else None

    def lowest(self, metric: str) -> float | None:
        finite = self.curves[metric].finite if metric in self.curves else []
        return min((value for _, value in finite), default=None)


@dataclass(frozen=True)
class Trial:
    """A point of a sweep and what has come of it."""

    point: Point
    state: PointState
    run: int | None
    """Its place among the report's runs; None where it has not begun."""
    values: Mapping[str, float]
    """The objectives that it has reached."""


@dataclass(frozen=True)
class Standing:
    """A sweep, the best point first."""

    sweep: Sweep
    path: str
    trials: Sequence[Trial]

    @property
    def settings(self) -> list[str]:
        """The settings in which the points differ."""
        keys = dict.fromkeys(key for trial in self.trials for key in trial.point.settings)
        return [key for key in keys if len({_written(t, key) for t in self.trials}) > 1]

    @property
    def best(self) -> Trial | None:
        """The best of the points that are done."""
        metric = self.sweep.objectives[0].metric
        done = (t for t in self.trials if t.state.state == "done" and metric in t.values)
        return next(done, None)


def _written(trial: Trial, key: str) -> str:
    return differences.written(trial.point.settings.get(key, differences.NOT_THERE))


def gathered(paths: Sequence[Path], here: Path) -> tuple[list[Run], list[Standing]]:
    """Read runs and sweeps. Raises UserError where one of the paths is neither."""
    around = runs.Around.now()
    found: dict[Path, Run] = {}
    standings = []
    for path in dict.fromkeys(paths):
        if directory.is_sweep(path):
            standings.append(_standing(path, here, around, found))
            continue
        for run_dir in runs.runs_in(path):
            if run_dir not in found:
                label = seen_from(path.parent, run_dir)
                found[run_dir] = read_run(run_dir, label, here, around)
    return _told_apart(list(found.values())), standings


def _told_apart(found: Sequence[Run]) -> list[Run]:
    """Return runs whose labels differ: by their paths, where two have the same."""
    labels = [run.label for run in found]
    return [
        run
        if labels.count(run.label) == 1
        else Run(**{**vars(run), "label": f"{run.label} ({run.path})"})
        for run in found
    ]


def _standing(path: Path, here: Path, around: runs.Around, found: dict[Path, Run]) -> Standing:
    sweep = directory.read(path)
    trials = []
    for point, state in zip(sweep.points, directory.states(sweep), strict=True):
        run_dir, place = sweep.run_dir(point.number), None
        if (run_dir / RUN_CONFIG).is_file():
            if run_dir not in found:
                label = f"{point.number}: {point.label}" if point.label else str(point.number)
                found[run_dir] = read_run(run_dir, label, here, around)
            place = list(found).index(run_dir)
        run = None if place is None else found[run_dir]
        trials.append(Trial(point, state, place, _values(sweep.objectives, state, run)))
    first = sweep.objectives[0]
    return Standing(sweep, seen_from(here, path), sorted(trials, key=lambda t: _rank(t, first)))


def _values(
    objectives: Sequence[Objective], state: PointState, run: Run | None
) -> dict[str, float]:
    """Return what a point has reached, as the sweep has noted it, or its run logged it last."""
    found = {name: v for name, v in state.values.items() if math.isfinite(v)}
    if run is not None and state.state == "done":
        for each in objectives:
            if each.metric not in found and (value := run.last(each.metric)) is not None:
                found[each.metric] = value
    return found


def _rank(trial: Trial, objective: Objective) -> tuple[bool, bool, float, int]:
    value = trial.values.get(objective.metric)
    worth = 0.0 if value is None else value if objective.direction == "minimize" else -value
    return value is None, trial.state.state != "done", worth, trial.point.number


def read_run(run_dir: Path, label: str, here: Path, around: runs.Around) -> Run:
    """Read one run; what is wrong with it is its state, and the others are shown."""
    path = seen_from(here, run_dir)
    curves = series.read(run_dir / METRICS)
    steps = [steps[-1] for each in curves.values() if (steps := each.steps)]
    given: dict[str, Any] = {"curves": curves, "marks": list(_marks(run_dir, curves))}
    given |= {"step": max(steps, default=None), "versions": {}, "data": {}}
    with suppress(OSError, ValueError, AttributeError):
        given["versions"] = differences.flat(watched.versions(run_dir))
        given["data"] = differences.flat(watched.data(run_dir))
    try:
        config = run_config.load(run_dir)
        given["settings"] = differences.flat(config.model_dump(mode="json"))
        looked = runs.look(run_dir, config, around)
    except (UserError, OSError, ValueError) as error:
        return Run(path, label, f"cannot be read: {str(error).partition(chr(10))[0]}", **given)
    state, given["total_steps"] = looked.state, looked.total_steps
    return Run(path, label, state.text, state.word, state.is_over, **given)


def _marks(run_dir: Path, curves: Mapping[str, Series]) -> Iterator[Mark]:
    longest = max(curves.values(), key=lambda each: len(each.steps), default=None)
    if longest is None or not longest.steps:
        return
    spikes = (Mark(SPIKE, each.at_step, each.text) for each in metrics.spikes(run_dir / METRICS))
    codes = (Mark("restart", *each) for each in metrics.changed_code(run_dir / METRICS))
    steps = (*_restarts(run_dir), *codes, *_checkpoints(run_dir), *_not_finite(curves))
    for mark in (*steps, *spikes):
        if mark.step <= longest.steps[-1]:
            place = min(bisect_left(longest.steps, mark.step), len(longest.steps) - 1)
            yield Mark(mark.kind, mark.step, mark.text, longest.tokens[place], longest.times[place])


def _restarts(run_dir: Path) -> Iterator[Mark]:
    try:
        entries = history.read(run_dir)
    except OSError:
        return
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        checkpoint = str(entry.get("checkpoint") or "the beginning")
        how = "restarted by torchrun" if entry.get("by") == history.BY_TORCHRUN else "resumed"
        how = "requeued" if "requeued_at_step" in entry else how
        given = " ".join(map(str, entry.get("overrides") or ()))
        step = layout.step_of(Path(checkpoint)) or 0
        yield Mark(
            "restart", step, f"{how} from {checkpoint}" + (f" with {given}" if given else "")
        )


def _checkpoints(run_dir: Path) -> Iterator[Mark]:
    try:
        named = layout.named(run_dir / CHECKPOINTS)
    except OSError:
        return
    for step, path in named:
        yield Mark(CHECKPOINT, step, path.name)


def _not_finite(curves: Mapping[str, Series]) -> Iterator[Mark]:
    at: dict[int, list[str]] = {}
    for name, each in curves.items():
        for step in each.not_finite:
            at.setdefault(step, []).append(name)
    for step, names in sorted(at.items()):
        yield Mark(NOT_FINITE, step, f"{', '.join(names)} not finite at step {step}")
