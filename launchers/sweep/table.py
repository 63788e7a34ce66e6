"""A sweep while it runs: a table that is drawn in place, or plain lines where none can be."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from shardwright.launchers import columns
from shardwright.launchers.columns import NOTHING, Column
from shardwright.launchers.runs import known_steps, left_seconds, logged
from shardwright.launchers.sweep.directory import STATES, PointState, Sweep
from shardwright.train import config as run_config
from shardwright.train.config import RunConfig, batch_sizes
from shardwright.train.console import block, progress
from shardwright.train.errors import UserError
from shardwright.train.units import counted, duration

LIFE_SECONDS = 60.0
"""Between two lines behind a pipe, where nothing else was said."""
DRAWN_SECONDS = 0.5
"""Between two drawings of the table, whatever changes."""
_FIRST = ("running", "failed", "stopped", "done", "pruned", "waiting")
"""Which points are shown where not all of them fit."""


@dataclass(frozen=True)
class Progress:
    """How far a point's run is; None stands for what is not known."""

    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    left_seconds: float | None = None

    @property
    def steps(self) -> str:
        if self.step is None:
            return NOTHING
        return f"{self.step}/{self.total_steps}" if self.total_steps else str(self.step)


class Table:
    """What a sweep shows of itself, and what is shown of one that runs elsewhere."""

    def __init__(self, console: TextIO | None = None, *, tells_changes: bool = False) -> None:
        """``tells_changes`` has a line for each point whose state has changed, behind a pipe."""
        self._console = sys.stdout if console is None else console
        self._block = block.Block(self._console) if progress.is_terminal(self._console) else None
        self._tells_changes = tells_changes
        self._shown_at = -DRAWN_SECONDS
        self._said_at = time.monotonic()
        self._before: Mapping[int, PointState] = {}
        self._configs: dict[Path, RunConfig] = {}
        self._last: tuple[Sweep, Sequence[PointState]] | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether this is a table, and not lines."""
        return self._block is not None

    def say(self, text: str) -> None:
        """Show a line that stays."""
        self._said_at = time.monotonic()
        if self._block is not None:
            self._block.write(text)
        else:
            print(text, file=self._console, flush=True)

    def update(self, sweep: Sweep, states: Sequence[PointState]) -> None:
        """Show how far all points are; call it as often as you like."""
        self._last = sweep, states
        now = time.monotonic()
        if self._block is not None:
            if now - self._shown_at >= DRAWN_SECONDS:
                self._shown_at = now
                self._draw()
            return
        if self._tells_changes:
            for line in changes(sweep, self._before, states):
                self.say(line)
        self._before = {state.number: state for state in states}
        if now - self._said_at >= LIFE_SECONDS:
            self.say(life(sweep, states, self._progress(sweep, states)))

    def close(self) -> None:
        """Draw how it stands a last time, and leave the terminal as it was."""
        if self._block is not None:
            if self._last is not None:
                self._draw()
            self._block.close()

    def _draw(self) -> None:
        assert self._block is not None
        assert self._last is not None
        sweep, states = self._last
        columns_, rows = block.window(self._console)
        far = self._progress(sweep, states)
        self._block.show(lines(sweep, states, far, columns_ - 1, rows - 1, time.time()))

    def _progress(self, sweep: Sweep, states: Sequence[PointState]) -> dict[int, Progress]:
        running = [state.number for state in states if state.state == "running"]
        return {number: self._progress_of(sweep.run_dir(number)) for number in running}

    def _progress_of(self, run_dir: Path) -> Progress:
        try:
            if run_dir not in self._configs:
                self._configs[run_dir] = run_config.load(run_dir)
            config, last = self._configs[run_dir], logged(run_dir)
            return progress_of(last, config, known_steps(run_dir, config, last))
        except (UserError, OSError, ValueError, KeyError, TypeError):
            return (
                Progress()
            )  # it is being written, or damaged: the table is not where that is told


def progress_of(last: Mapping[str, Any], config: RunConfig, total: int | None) -> Progress:
    """Return how far a run is by what it has logged last. Pure."""
    return Progress(
        last.get("step"),
        total,
        last.get("loss"),
        last.get("tokens_per_second"),
        left_seconds(last, total, batch_sizes(config.trainer)),
    )


# --- as text --------------------------------------------------------------------------------------


def counts(states: Sequence[PointState]) -> str:
    """Return how many points are in each state. Pure."""
    there = [state.state for state in states]
    return ", ".join(f"{there.count(each)} {each}" for each in STATES if each in there)


def lines(
    sweep: Sweep,
    states: Sequence[PointState],
    far: Mapping[int, Progress],
    width: int,
    rows: int,
    now: float,
) -> list[str]:
    """Return a line of counts and a table of points, in no more than so many rows. Pure."""
    began = [state.started for state in states if state.started is not None]
    since = f", {duration(now - min(began))} since the first began" if began else ""
    head = f"{sweep.name}: {counted(len(states), 'point')}, {counts(states)}{since}"
    if rows < 4 or not states:
        return [head]
    room = rows - 2  # the counts, and the names of the columns
    chosen = list(states)
    if len(states) > room:
        by_need = sorted(states, key=lambda s: (_FIRST.index(s.state), -(s.ended or 0), s.number))
        chosen = sorted(by_need[: room - 1], key=lambda s: s.number)
    shown = {state.number for state in chosen}
    left = [state for state in states if state.number not in shown]
    more = [f"… and {counted(len(left), 'more point')}: {counts(left)}"] if left else []
    return [head, *columns.table(_columns(sweep, chosen, far), width), *more]


def _columns(
    sweep: Sweep, states: Sequence[PointState], far: Mapping[int, Progress]
) -> Iterator[Column]:
    points = {point.number: point for point in sweep.points}
    at = [far.get(state.number, Progress()) for state in states]
    settings = [points[state.number].label or NOTHING for state in states]
    yield Column("point", tuple(str(state.number) for state in states))
    yield Column("settings", tuple(settings), is_text=True, least=18, keeps_end=True)
    yield Column("step", tuple(each.steps for each in at), rank=4)
    losses = (NOTHING if each.loss is None else f"{each.loss:.4f}" for each in at)
    yield Column("loss", tuple(losses), rank=3)
    speeds = (
        NOTHING if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}"
        for each in at
    )
    yield Column("tokens/s", tuple(speeds), rank=1)
    left = (NOTHING if e.left_seconds is None else duration(e.left_seconds) for e in at)
    yield Column("left", tuple(left), rank=2)
    for objective in sweep.objectives:
        values = (state.values.get(objective.metric) for state in states)
        shown = (NOTHING if value is None else f"{value:.5g}" for value in values)
        yield Column(objective.metric, tuple(shown), rank=5)
    yield Column("state", tuple(map(_state, states)), is_text=True, least=7)


def _state(state: PointState) -> str:
    """Return a point's state, and where it runs or why it has ended so. Pure."""
    more = state.where if state.state == "running" else state.why
    if state.state in ("done", "waiting") or not more:
        return state.state
    joined = f"{state.state} on" if state.state == "running" else f"{state.state}:"
    return f"{joined} {more.strip().partition(chr(10))[0]}"


def changes(
    sweep: Sweep, before: Mapping[int, PointState], states: Sequence[PointState]
) -> Iterator[str]:
    """Yield a line for each point whose state is another one than before. Pure."""
    points = {point.number: point for point in sweep.points}
    for state in states:
        was = before.get(state.number)
        if state.state == (was.state if was else "waiting"):
            continue
        values = "".join(f", {name} {value:.5g}" for name, value in state.values.items())
        label = points[state.number].label
        yield f"point {state.number}  {label}: {_state(state)}{values}"


def life(sweep: Sweep, states: Sequence[PointState], far: Mapping[int, Progress]) -> str:
    """Return the line that shows that a sweep goes on. Pure."""
    steps = ", ".join(f"point {number} at step {each.steps}" for number, each in far.items())
    return f"{sweep.name}: {counts(states)}" + (f"; {steps}" if steps else "")
