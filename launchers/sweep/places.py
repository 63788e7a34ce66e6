"""What a sweep asks of where its points run, of who proposes them, and of what shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shardwright.launchers.composition.compose import quoted
from shardwright.launchers.composition.errors import PLAIN
from shardwright.launchers.sweep.directory import Point, PointState, Sweep
from shardwright.train.config import RunConfig


@dataclass(frozen=True)
class Task:
    """One start of a point."""

    point: Point
    run_dir: Path
    """Absolute. It is there already where the run ``is_resumed``."""
    config: RunConfig
    """What the point comes to, all resolved; the run that is started resolves it for itself."""
    choices: dict[str, str]
    """Option chosen of each group."""
    arguments: tuple[str, ...]
    """Words of all points, before those of this one."""
    is_resumed: bool
    log: Path
    """Where what the run prints is appended to."""

    def command(self, *more: str) -> list[str]:
        """Return the arguments of `shardwright` that start it, with words that a place adds."""
        if self.is_resumed:
            return ["resume", str(self.run_dir), *more]
        path = str(self.run_dir)
        place = f"run_dir={path if PLAIN.fullmatch(path) else quoted(path)}"
        return ["train", *self.arguments, *self.point.overrides, *more, place]


@dataclass(frozen=True)
class Outcome:
    """How a start of a point has ended."""

    number: int
    code: int
    """The exit code of `shardwright train`; minus a signal that killed it."""
    why: str | None = None
    """What the place itself knows of a failure."""
    is_lost: bool = False
    """Whether the place has lost it, and nothing was wrong with the point: it is started again."""


class Place(Protocol):
    """Where points run, several at a time. All calls come from one thread."""

    @property
    def stays(self) -> bool:
        """Whether the sweep waits for what it has started; a queue's jobs go on without it."""

    @property
    def outlives(self) -> bool:
        """Whether what runs goes on where the sweep is told to stop."""

    def take_over(self, numbers: Iterable[int]) -> set[int]:
        """Return which points, running when an earlier start of the sweep ended, are still there.

        How each of these ends, or has ended meanwhile, `ended` tells.
        """

    def described(self) -> str:
        """Return in words how many points it runs at a time, and with what."""

    def how_to_stop(self) -> str:
        """Return in words how a user ends it, and what becomes of the points."""

    def room(self) -> int:
        """Return how many more points may be started now."""

    def start(self, tasks: Sequence[Task]) -> Sequence[str]:
        """Start points, no more than there is room for; return in words where each is."""

    def ended(self, timeout_seconds: float) -> Sequence[Outcome]:
        """Return what has ended since it was asked last, waiting this long for the first."""

    def stop(self, numbers: Iterable[int], *, at_once: bool = False) -> None:
        """Have points save and end, which `ended` then tells; at once: without saving."""

    def close(self) -> None:
        """Leave nothing behind, where the sweep ends in whatever way."""


@dataclass(frozen=True)
class Proposal:
    """A point to run that is in no plan yet."""

    settings: dict[str, Any]
    overrides: tuple[str, ...]
    trial: int | None = None
    """Its number in the study of a search."""


class Proposer(Protocol):
    """Who says what to run next, once all points of the plan are over or running."""

    def propose(self, count: int) -> Sequence[Proposal]:
        """Return up to this many points; fewer or none where it first has to be told of others."""

    def is_finished(self) -> bool:
        """Return whether it will never propose anything again."""

    def tell(self, state: PointState) -> None:
        """Learn how a point has ended, done, pruned or failed; also one of an earlier start."""

    def prune(self, number: int) -> str | None:
        """Return why a running point is not worth its time, None where it goes on."""


class Grid:
    """Proposes nothing: all points of a grid are in the plan from the start."""

    def propose(self, count: int) -> Sequence[Proposal]:
        del count
        return ()

    def is_finished(self) -> bool:
        return True

    def tell(self, state: PointState) -> None:
        del state

    def prune(self, number: int) -> str | None:
        del number
        return None


class Display(Protocol):
    """What shows a sweep while it runs."""

    def say(self, text: str) -> None:
        """Show a line that stays."""

    def update(self, sweep: Sweep, states: Sequence[PointState]) -> None:
        """Show how far all points are: called after each change, and every second or so."""

    def close(self) -> None:
        """Leave the terminal as it was."""
