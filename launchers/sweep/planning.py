"""From a request to a plan: the points, their directory, and each composed and checked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from shardwright.launchers import preflight
from shardwright.launchers.composition.compose import Job, compose, plain, quoted, resolved
from shardwright.launchers.composition.settled import settled
from shardwright.launchers.machine import names
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.sweep import decisions, directory, grid
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.directory import Point, Sweep
from shardwright.launchers.sweep.places import Task
from shardwright.launchers.sweep.request import Request
from shardwright.train import config as run_config
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute
from shardwright.train.run_directory.names import RUN_CONFIG

SWEEPS = "sweeps"
"""The folder, where the user is, that new sweeps get their directories in."""
MOST_NUMBERS = 8
"""Of points that a message names by number."""


def plan_of(request: Request, wanted: Sequence[Point], *, is_search: bool = False) -> Sweep:
    """Return the plan of a sweep: begun anew, or the one in its directory with what it has grown.

    ``wanted`` are all points of the grid, without a limit. Writes nothing. Raises UserError where
    the directory is that of another sweep, or of something else.
    """
    before = _before(request, wanted, is_search=is_search)
    config = request.config
    if before is None:
        place = request.sweep_dir or names.free(_generated(config.name))
        points = grid.joined((), wanted, config.limit)
        sweep = directory.begun(place, config, request.arguments)
        return dataclasses.replace(sweep, points=tuple(points))
    points = grid.joined(before.points, wanted, config.limit)
    return dataclasses.replace(before, definition=config, points=tuple(points))


def _generated(name: str) -> Path:
    return Path(absolute(f"{SWEEPS}/{name}-{time.strftime('%Y%m%d-%H%M%S')}"))


def _before(request: Request, wanted: Sequence[Point], *, is_search: bool) -> Sweep | None:
    """Return the sweep that is to be continued; None where a new one begins."""

    def others(sweep: Sweep) -> list[str]:
        return decisions.differences(sweep, request.arguments, None if is_search else wanted)

    given = request.sweep_dir
    if given is None:
        found = [s for s in begun(Path(absolute(SWEEPS))) if not others(s)]
        same = [s for s in found if _is_same_search(s.definition, request.config)]
        return max(same, key=lambda s: s.created, default=None)
    if not directory.is_sweep(given):
        if given.is_dir() and any(given.iterdir()):
            raise UserError(
                f"sweep_dir={given} is no sweep's and is not empty; choose another, or remove it "
                "first"
            )
        return None
    sweep = directory.read(given)
    if problems := others(sweep):
        raise UserError(decisions.another_sweep(given, problems))
    return sweep


def _is_same_search(before: SweepConfig, now: SweepConfig) -> bool:
    if now.search.kind == "none" and now.backend != "wandb":
        return before.search == now.search
    # What it goes through is told by no list of points.
    fields = ("search", "grid", "objectives", "backend", "name")
    return all(getattr(before, name) == getattr(now, name) for name in fields)


def begun(folder: Path) -> list[Sweep]:
    """Return the sweeps in a folder whose plans can be read."""
    found = []
    for path in sorted(folder.glob(f"*/{directory.PLAN}")):
        try:
            found.append(directory.read(path.parent))
        except UserError:
            continue
    return found


# --- points, composed -----------------------------------------------------------------------------


@dataclass
class Composer:
    """Composes points of a sweep, each as the run that it will be."""

    sweep: Sweep
    here: Machine
    words: tuple[str, ...] = ()
    """Settings that a place adds to each start."""
    stamp: str = ""
    _jobs: dict[int, Job] = field(default_factory=dict)

    def job(self, point: Point) -> Job:
        """Return a point as it is composed. Raises UserError where it is not."""
        if point.number not in self._jobs:
            place = f"run_dir={quoted(str(self.sweep.run_dir(point.number)))}"
            found = compose([*self.sweep.common(point), *point.overrides, place])
            (self._jobs[point.number],) = found
        return self._jobs[point.number]

    def given(self, point: Point) -> RunConfig:
        """Return a point's config as it is asked for, or as its run has it if it has begun."""
        run_dir = self.sweep.run_dir(point.number)
        if (run_dir / RUN_CONFIG).is_file():
            return run_config.load(run_dir)
        job = self.job(point)
        return from_tree(plain(job.tree), job.typed)

    def task(self, point: Point) -> Task:
        """Return what starts a point. Raises UserError, a line for each problem, if it cannot."""
        run_dir = self.sweep.run_dir(point.number)
        log = self.sweep.log(point.number)
        common = tuple(self.sweep.common(point))
        if (run_dir / RUN_CONFIG).is_file():
            config = run_config.load(run_dir)
            preflight.check_machine(config, self.here)
            return Task(point, run_dir, config, {}, common, True, log)
        job = self.job(point)
        if self.words:
            tree = OmegaConf.merge(job.tree, _tree(self.words))
            assert isinstance(tree, DictConfig)
            job = dataclasses.replace(job, tree=tree)
        job = settled(job, self.here).job
        config = resolved(job, self.here, self.stamp)
        if not run_dir.exists():
            preflight.check(config, self.here)
        return Task(point, run_dir, config, dict(job.choices), common, False, log)


def _tree(words: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for word in words:
        key, _, value = word.partition("=")
        section, _, leaf = key.partition(".")
        found.setdefault(section, {})[leaf] = value.strip("'")
    return found


def check(points: Iterable[Point], do: Callable[[Point], object]) -> None:
    """Do something with each point; raise UserError with what is wrong, said once for all alike."""
    checked, problems = 0, dict[str, list[int]]()
    for point in points:
        checked += 1
        try:
            do(point)
        except UserError as error:
            for line in str(error).replace(f"/{point.number}/", "/N/").splitlines():
                problems.setdefault(line, []).append(point.number)
    if problems:
        raise UserError(
            "\n".join(f"{line}{_of_points(n, checked)}" for line, n in problems.items())
        )


def _of_points(numbers: Sequence[int], checked: int) -> str:
    """Return of which points something is said, in parentheses; nothing where of all. Pure."""
    if len(numbers) == checked:
        return ""
    listed = ", ".join(map(str, numbers[:MOST_NUMBERS]))
    more = f" and {len(numbers) - MOST_NUMBERS} more" if len(numbers) > MOST_NUMBERS else ""
    return f" (point{'s' * (len(numbers) > 1)} {listed}{more})"
