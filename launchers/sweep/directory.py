"""The directory of a sweep: its plan, the state of each of its points, and who owns it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from shardwright.launchers.composition import engine_file
from shardwright.launchers.sweep import definition
from shardwright.launchers.sweep.definition import Objective, SweepConfig
from shardwright.train.durable import write_text
from shardwright.train.errors import UserError
from shardwright.train.run_directory import owner

PLAN = "sweep.json"
LOCK = "sweep.lock"
POINTS = "points"
JOURNAL = "study.journal"
"""What Optuna keeps of a search."""
VERSION = 1

State = Literal["waiting", "running", "done", "stopped", "failed", "pruned"]
STATES: tuple[State, ...] = get_args(State)
OVER: tuple[State, ...] = ("done", "pruned")
"""What no later start of the sweep runs again."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep, by what distinguishes it from the others."""

    number: int
    settings: Mapping[str, Any]
    """Value of each key or group that the sweep varies."""
    overrides: tuple[str, ...]
    """The same as words of a command line, which the sweep's common ones come before."""

    @property
    def label(self) -> str:
        """Its settings in one line."""
        return " ".join(self.overrides)


@dataclass(frozen=True)
class PointState:
    """What the sweep has decided of a point; how far a living run is, `launchers.runs` tells."""

    number: int
    state: State = "waiting"
    attempts: int = 0
    """How often it was started."""
    failures: int = 0
    """How many of these starts have failed."""
    code: int | None = None
    """Exit code of its last start."""
    why: str | None = None
    """What is said where it failed or was stopped."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The objectives that it has reached."""
    trial: int | None = None
    """Its number in the study of a search."""
    where: str | None = None
    """Host, devices or job that it was started on."""
    started: float | None = None
    """Of its last start; seconds since 1970, like ``ended``."""
    ended: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether no later start of the sweep runs it again."""
        return self.state in OVER


@dataclass(frozen=True)
class Sweep:
    """The plan of a sweep."""

    directory: Path
    name: str
    created: float
    """Seconds since 1970."""
    definition: SweepConfig
    arguments: tuple[str, ...]
    """The words that all points have in common, flags for a folder of options included."""
    points: tuple[Point, ...] = ()
    """In order of first appearance; a search and a grown grid add to them."""
    working_directory: str | None = None
    """Where relative paths in the arguments begin; None is wherever the sweep is run."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return self.definition.objectives

    def common(self, point: Point) -> list[str]:
        """Return the words that a point has in common with others."""
        strategies = str(self.definition.grid.get("strategy", ""))
        return engine_file.of_point(self.arguments, point.overrides, strategies)

    def run_dir(self, number: int) -> Path:
        """Return the run directory of a point."""
        return self.directory / str(number)

    def log(self, number: int) -> Path:
        """Return where what the starts of a point print is kept."""
        return self.directory / POINTS / f"{number}.log"


def is_sweep(path: Path) -> bool:
    """Return whether a directory is a sweep's; that of `train -m` has no plan and is none."""
    return (path / PLAN).is_file()


def read(sweep_dir: Path) -> Sweep:
    """Read the plan of a sweep. Raises UserError where there is none, or it is damaged."""
    path = sweep_dir / PLAN
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{sweep_dir} is not a directory of a sweep: cannot read {path} ({error.strerror}); "
            "give the one that `shardwright sweep` printed"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged, it does not parse as JSON: {error}") from None
    try:
        if tree["version"] > VERSION:
            raise UserError(
                f"{path} was written by a later version of Shardwright (version "
                f"{tree['version']} of the format, this one reads up to {VERSION}); install it"
            )
        return Sweep(
            sweep_dir,
            tree["name"],
            tree["created"],
            definition.from_tree(tree["definition"]),
            tuple(tree["arguments"]),
            tuple(Point(p["number"], p["settings"], tuple(p["overrides"])) for p in tree["points"]),
            tree.get("working_directory"),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, it lacks what a plan has: {error!r}") from None


def write_plan(sweep: Sweep) -> None:
    """Write the plan of a sweep into its directory, whole or not at all."""
    (sweep.directory / POINTS).mkdir(parents=True, exist_ok=True)
    tree = {
        "version": VERSION,
        "name": sweep.name,
        "created": sweep.created,
        "definition": sweep.definition.model_dump(mode="json"),
        "arguments": list(sweep.arguments),
        "working_directory": sweep.working_directory,
        "objectives": [each.model_dump(mode="json") for each in sweep.objectives],
        "points": [dataclasses.asdict(point) for point in sweep.points],
    }
    write_text(sweep.directory / PLAN, json.dumps(tree, indent=1) + "\n")


def state_of(sweep_dir: Path, number: int) -> PointState:
    """Return the state of a point; one that nothing is known of waits."""
    try:
        tree = json.loads((sweep_dir / POINTS / f"{number}.json").read_text(encoding="utf-8"))
        known = {each.name for each in dataclasses.fields(PointState)}
        found = PointState(**{name: value for name, value in tree.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return PointState(number)
    return found if found.state in STATES else PointState(number)


def states(sweep: Sweep) -> list[PointState]:
    """Return the state of each point of a plan, in its order."""
    return [state_of(sweep.directory, point.number) for point in sweep.points]


def write_state(sweep_dir: Path, state: PointState) -> None:
    """Replace the state of a point, whole or not at all."""
    tree = dataclasses.asdict(state)
    # JSON has no number for what a run that diverged may have logged.
    tree["values"] = {k: v for k, v in state.values.items() if math.isfinite(v)}
    write_text(sweep_dir / POINTS / f"{state.number}.json", json.dumps(tree) + "\n")


@contextlib.contextmanager
def claimed(sweep_dir: Path) -> Iterator[None]:
    """Own a sweep's directory for life: the kernel's lock, which no kill leaves behind.

    Raises UserError where another sweep has it.
    """
    with owner.locked_file(sweep_dir / LOCK) as other:
        if other is not None:
            raise UserError(
                f"{sweep_dir} belongs to a sweep that is alive ({other}); wait until it has ended, "
                "or stop it first by Ctrl-C or SIGTERM"
            )
        yield


def is_alive(sweep_dir: Path) -> bool:
    """Return whether a sweep runs in a directory now. Not for the one that does, as `claimed`."""
    return owner.is_locked(sweep_dir / LOCK)


def begun(directory: Path, config: SweepConfig, arguments: tuple[str, ...]) -> Sweep:
    """Return the plan of a new sweep in the working directory, without its points."""
    return Sweep(directory, config.name, time.time(), config, arguments, (), os.getcwd())
