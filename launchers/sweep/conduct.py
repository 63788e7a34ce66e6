"""The loop of a sweep: start points where there is room, learn how they end, until all are over."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from shardwright.launchers import runs
from shardwright.launchers.ranks import child
from shardwright.launchers.sweep import decisions, directory, objectives
from shardwright.launchers.sweep.directory import Point, PointState, Sweep
from shardwright.launchers.sweep.places import Display, Grid, Outcome, Place, Proposer, Task
from shardwright.train import config as run_config
from shardwright.train.errors import BAD_INPUT, INTERRUPTED, UserError
from shardwright.train.process import signals
from shardwright.train.run_directory import owner
from shardwright.train.run_directory.names import METRICS, RUN_CONFIG

POLL_SECONDS = 0.5
LOG_BYTES = 2**14
MOST_LOST = 5
"""How often a point that its place has lost is started again at once, before the sweep gives up."""
LOG_LINES = 3
"""Of the end of a log, where nothing else says why a point has failed."""

Plan = Callable[[Point], Task]
"""Composes and checks a point; raises UserError where it cannot be run."""


class Conductor:
    """One start of a sweep, whose directory this process owns."""

    def __init__(
        self, sweep: Sweep, place: Place, proposer: Proposer, display: Display, plan: Plan
    ) -> None:
        self.sweep = sweep
        self._place = place
        self._proposer = proposer
        self._display = display
        self._plan = plan
        self._states = {state.number: state for state in directory.states(sweep)}
        self._running: set[int] = set()
        self._pruned: dict[int, str] = {}
        self._lost: dict[int, int] = {}
        self._told_missing = False
        self._signals: list[int] = []
        self._logged_before: dict[int, int] = {}
        """Bytes that the log of a point had before this start."""

    @property
    def states(self) -> list[PointState]:
        """What is decided of each point, in the order of the plan."""
        return [self._states[point.number] for point in self.sweep.points]

    def run(self, *, retries_all: bool = False) -> int:
        """Run what is left, whatever comes of each; return the exit code."""
        with self._noting_signals(), contextlib.closing(self._place):
            self._take_over()
            limit = self.sweep.definition.max_retries
            numbers = decisions.to_start(self.states, limit, retries_all=retries_all)
            waiting = [number for number in numbers if number not in self._running]
            for state in self.states:
                if state.number not in waiting and state.number not in self._running:
                    self._proposer.tell(state)
            self._loop(waiting)
        self._display.update(self.sweep, self.states)
        self._display.close()
        if self._signals.count(signal.SIGINT) > 1:
            return INTERRUPTED
        return decisions.exit_code(self.states, was_stopped=bool(self._signals))

    def _loop(self, waiting: list[int]) -> None:
        told = 0
        while True:
            if self._signals and told < len(self._signals):
                self._stop(is_first=told == 0)
                told = len(self._signals)
            if not self._signals:
                self._start(waiting)
            is_idle = not self._running or not self._place.stays
            is_left = self._place.outlives and bool(self._signals)
            if is_left or (is_idle and (self._signals or self._is_finished(waiting))):
                return
            for outcome in self._place.ended(POLL_SECONDS):
                self._end(outcome)
                if self._is_to_start_again(outcome):
                    waiting.insert(0, outcome.number)
            self._prune()
            self._display.update(self.sweep, self.states)

    def _take_over(self) -> None:
        """Learn what has become of what an earlier start has left to run without it."""
        left = [state.number for state in self.states if state.state == "running"]
        self._running |= self._place.take_over(left)
        if self._running:
            for outcome in self._place.ended(0.0):
                self._end(outcome)

    def _is_finished(self, waiting: Sequence[int]) -> bool:
        return not waiting and self._proposer.is_finished()

    # --- signals --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _noting_signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            del frame
            self._signals.append(number)

        handled = [n for n in child.ASKS_TO_STOP if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in handled}
        # It asks one run for a profile.
        before[child.PROFILE] = signal.signal(child.PROFILE, lambda number, frame: None)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, *, is_first: bool) -> None:
        """Pass a stop on; a second Ctrl-C kills."""
        at_once = self._signals.count(signal.SIGINT) > 1
        if self._place.outlives:
            if is_first and self._running:
                text = f"{len(self._running)} point(s) go on without this command"
                self._display.say(f"{signals.by_whom(self._signals[0])}: {text}")
            return
        if is_first:
            by = signals.by_whom(self._signals[0])
            running = f"{len(self._running)} point(s) save and end" if self._running else "stopping"
            more = "; Ctrl-C again kills them" if by == signals.CTRL_C and self._running else ""
            self._display.say(f"{by}: {running}, and no other is started{more}")
        if is_first or at_once:
            self._place.stop(self._running, at_once=at_once)

    # --- points ---------------------------------------------------------------------------------

    def _start(self, waiting: list[int]) -> None:
        """Start what there is room for; ``waiting`` are the numbers still to be started."""
        room = self._place.room()
        tasks: list[Task] = []
        while len(tasks) < room and (waiting or self._propose(waiting, room - len(tasks))):
            number = waiting.pop(0)
            state = self._settled(number)
            if state.is_over:
                self._keep(state)
                self._proposer.tell(state)
                continue
            try:
                tasks.append(self._plan(self.sweep.points[number]))
            except UserError as error:
                self._failed_to_start(state, str(error))
        if not tasks:
            return
        # Noted first: a kill between the two costs an attempt in the count, and no run.
        for task in tasks:
            with contextlib.suppress(OSError):
                self._logged_before[task.point.number] = task.log.stat().st_size
            state = decisions.cleaned(self._states[task.point.number])
            attempts = state.attempts + 1
            self._keep(
                dataclasses.replace(state, state="running", attempts=attempts, started=time.time())
            )
        for task, where in zip(tasks, self._place.start(tasks), strict=True):
            number = task.point.number
            self._running.add(number)
            self._keep(dataclasses.replace(self._states[number], where=where))
            verb = "resumed" if task.is_resumed else "started"
            self._display.say(f"point {number}  {task.point.label}: {verb} on {where}")

    def _propose(self, waiting: list[int], count: int) -> bool:
        """Take up new points of a search; return whether there are any."""
        found = self._proposer.propose(count)
        for each in found:
            number = len(self.sweep.points)
            point = Point(number, each.settings, each.overrides)
            self.sweep = dataclasses.replace(self.sweep, points=(*self.sweep.points, point))
            self._keep(PointState(number, trial=each.trial))
            waiting.append(number)
        if found:
            directory.write_plan(self.sweep)
        return bool(found)

    def _settled(self, number: int) -> PointState:
        """Return the state of a point that is to be started; it may have come to its end."""
        state, run_dir = self._states[number], self.sweep.run_dir(number)
        if not (run_dir / RUN_CONFIG).is_file():
            if run_dir.is_dir():  # killed before it was a run's
                shutil.rmtree(run_dir)
            return state
        self._await_end(number)
        if not runs.is_done(run_dir, run_config.load(run_dir)):
            # Pruned by a sweep that was killed before it could stop the run, or say so.
            if (why := self._proposer.prune(number)) is not None:
                values = decisions.values(metrics(run_dir), self.sweep.objectives)
                return dataclasses.replace(
                    state, state="pruned", why=why, values=values, ended=time.time()
                )
            return state
        values = decisions.values(metrics(run_dir), self.sweep.objectives)
        return dataclasses.replace(
            state, state="done", code=0, why=None, values=values, ended=time.time()
        )

    def _await_end(self, number: int) -> None:
        """Wait for the end of a run that a killed sweep has left: it saves and ends by itself."""
        told = False
        while not self._signals and owner.look(self.sweep.run_dir(number))[1]:
            if not told:
                self._display.say(f"point {number} is still alive: waiting until it has ended")
                told = True
            time.sleep(POLL_SECONDS)

    def _failed_to_start(self, state: PointState, why: str) -> None:
        state = dataclasses.replace(
            decisions.cleaned(state),
            state="failed",
            failures=state.failures + 1,
            code=BAD_INPUT,
            why=why,
            ended=time.time(),
        )
        self._keep(state)
        self._proposer.tell(state)
        point = self.sweep.points[state.number]
        self._display.say(decisions.ended(point, state, None, alike=self._alike(state)))

    def _end(self, outcome: Outcome) -> None:
        number, state = outcome.number, self._states[outcome.number]
        self._running.remove(number)
        run_dir, log = self.sweep.run_dir(number), self.sweep.log(number)
        is_pruned = number in self._pruned
        is_run = (run_dir / RUN_CONFIG).is_file()
        became = decisions.state_after(
            outcome.code,
            is_done=is_run and runs.is_done(run_dir, run_config.load(run_dir)),
            was_stopped=bool(self._signals),
            is_pruned=is_pruned,
        )
        why = self._pruned.get(number) if became == "pruned" else None
        if became in ("failed", "stopped"):
            before = self._logged_before.get(number, 0)
            why = outcome.why or reason(run_dir, log, outcome.code, before)
        now = time.time()
        state = dataclasses.replace(
            state,
            state=became,
            failures=state.failures + (became == "failed"),
            code=outcome.code,
            why=why,
            values=decisions.values(metrics(run_dir), self.sweep.objectives),
            ended=now,
        )
        self._keep(state)
        if became == "done":
            self._check_objectives(self.sweep.points[number])
        if became in ("done", "pruned", "failed"):
            self._proposer.tell(state)
        took = now - state.started if state.started else None
        point = self.sweep.points[number]
        self._display.say(decisions.ended(point, state, took, alike=self._alike(state)))

    def _check_objectives(self, point: Point) -> None:
        """Tell, once, where a point that is done has not logged by what it is compared.

        Raises UserError in a search, which cannot learn from such points.
        """
        logged = {name: None for line in metrics(self.sweep.run_dir(point.number)) for name in line}
        if (why := objectives.missing(logged, self.sweep.objectives)) is None:
            return
        if not isinstance(self._proposer, Grid):
            raise UserError(f"point {point.number} is done, but {why}")
        if not self._told_missing:
            self._told_missing = True
            self._display.say(f"point {point.number} is done, but {why}")

    def _is_to_start_again(self, outcome: Outcome) -> bool:
        """Return whether a point is started again at once, as nothing was wrong with it."""
        if not outcome.is_lost or self._states[outcome.number].state != "stopped":
            return False
        self._lost[outcome.number] = self._lost.get(outcome.number, 0) + 1
        return self._lost[outcome.number] <= MOST_LOST

    def _alike(self, state: PointState) -> int | None:
        """Return another point that has failed for the same reason, which is told already."""
        others = (s for s in self.states if s.state == "failed" and s.number != state.number)
        return next((s.number for s in others if s.why == state.why), None)

    def _prune(self) -> None:
        for number in list(self._running):
            if number not in self._pruned and (why := self._proposer.prune(number)):
                self._pruned[number] = why
                self._place.stop([number])

    def _keep(self, state: PointState) -> None:
        self._states[state.number] = state
        directory.write_state(self.sweep.directory, state)


def metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's metrics; what cannot be read is left out."""
    try:
        text = (run_dir / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(entry := json.loads(line), dict):
                yield entry


def reason(run_dir: Path, log: Path, code: int, before: int = 0) -> str:
    """Return why a point has ended before its end, as far as its run or its log tells.

    ``before`` bytes of the log are of earlier starts.
    """
    if (run_dir / RUN_CONFIG).is_file():
        said = runs.of(run_dir).state
        if said.startswith(("failed", "stopped")):
            return said.removeprefix("failed: ")
    with contextlib.suppress(OSError), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(before, size - LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
        told = [line for line in lines if line.strip()]
        from_error = next((n for n, x in enumerate(told) if x.startswith("error:")), None)
        last = told[from_error:][:LOG_LINES] if from_error is not None else told[-LOG_LINES:]
        if last:
            return "\n".join(last).removeprefix("error: ")
    return f"exit code {code}"
