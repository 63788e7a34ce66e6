"""Watching what runs elsewhere: a run or a sweep, by its files, until it has ended."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from shardwright.launchers import runs
from shardwright.launchers.runs import Look
from shardwright.launchers.sweep import decisions, directory
from shardwright.launchers.sweep.directory import PointState
from shardwright.launchers.sweep.table import Table
from shardwright.launchers.watching import line
from shardwright.train import config as run_config
from shardwright.train import program
from shardwright.train.config import RunConfig, batch_sizes
from shardwright.train.console import block, progress
from shardwright.train.errors import FAILED, RESUMABLE
from shardwright.train.run_directory.metrics import held_out, tail
from shardwright.train.run_directory.names import METRICS

LOOK_SECONDS = 5.0
"""Between two looks at the state of a run: its lock, its failures, processes."""
LOOK_AT_A_JOB_SECONDS = 30.0
"""The same where SLURM's controller has to be asked."""
LIFE_SECONDS = 60.0
"""Between two lines behind a pipe, where its log has none."""
FIRST_LINES = 10
"""Of the log, at the start."""
_ENDED = {"done": 0, "stopped": RESUMABLE, "failed": FAILED, "dead": FAILED}
"""Exit code by how a run has ended. One that is silent may be heard of again."""


class Tail:
    """The whole lines that come to a log, whichever it is at the time."""

    def __init__(self, find: Callable[[], Path | None], first_lines: int) -> None:
        self._find, self._first_lines = find, first_lines
        self._path: Path | None = None
        self._read_bytes = 0
        self._rest = b""

    def lines(self) -> list[str]:
        """Return the lines that have come since the last time; at first the last ones."""
        path = self._find()
        if path is None:
            return []
        is_first = self._path is None
        try:
            if path != self._path or path.stat().st_size < self._read_bytes:
                self._path, self._read_bytes, self._rest = path, 0, b""
            with path.open("rb") as file:
                file.seek(self._read_bytes)
                data = file.read()
        except OSError:  # a file server that is away for a while
            return []
        self._read_bytes += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        found = [text.decode(errors="replace").rstrip("\r") for text in whole]
        return found[-self._first_lines :] if is_first else found


class RunWatch:
    """One run, drawn as a line below its log or told in lines."""

    def __init__(self, run_dir: Path, log: Callable[[], Path | None], console: TextIO) -> None:
        self._run_dir, self._console = run_dir, console
        self._config = run_config.load(run_dir)
        self._block = block.Block(console) if progress.is_terminal(console) else None
        self._log = Tail(log, FIRST_LINES)
        self._looked_at = -LOOK_AT_A_JOB_SECONDS
        self._said_at = time.monotonic()
        self._said_state = ""
        self._was_silent = False
        self.look = self._look()

    def step(self) -> int | None:
        """Show what is new; return the exit code once the run has ended."""
        every = LOOK_SECONDS if self.look.job is None else LOOK_AT_A_JOB_SECONDS
        if time.monotonic() - self._looked_at >= every:
            self.look = self._look()
        code = _ENDED.get(self.look.state.word)
        for text in self._log.lines():  # after the state: what is over has written all of it
            self._say(text)
        if code is None:
            self._show()
        return code

    def close(self, code: int | None) -> None:
        """Say how it has ended, or leave the terminal as it was."""
        if self._block is not None:
            self._block.close(keeps=code is None)
        if code is None:
            return
        print(f"{self._run_dir}: {self.look.state.text}", file=self._console)
        if not self.look.is_done:
            command = program.command("resume", str(self._run_dir))
            print(f"  resume it with: {command}", file=self._console)

    def _look(self) -> Look:
        self._looked_at = time.monotonic()
        with suppress(Exception):  # it is being resumed: its config is another in a moment
            self._config = run_config.load(self._run_dir)
        return runs.look(self._run_dir, self._config)

    def _say(self, text: str) -> None:
        self._said_at = time.monotonic()
        if self._block is not None:
            self._block.write(text)
        else:
            print(text, file=self._console, flush=True)

    def _show(self) -> None:
        found, share, silent = status(self._run_dir, self._config, self.look)
        if self._block is not None:
            columns, _ = block.window(self._console)
            self._block.show([line.drawn(found, share, columns - 1)])
            return
        state = self.look.state.text if not self.look.last else self.look.state.word
        is_new = state != self._said_state or (silent is not None) != self._was_silent
        if is_new or time.monotonic() - self._said_at >= LIFE_SECONDS:
            self._say(line.fitted(found, 1000))
        self._said_state, self._was_silent = state, silent is not None


def status(
    run_dir: Path, config: RunConfig, look: Look
) -> tuple[list[line.Fact], float | None, float | None]:
    """Return what there is to say of a run now, which share is done, and how long it is silent."""
    lines = tail(run_dir / METRICS)
    last = dict(look.last)
    for each in lines:
        last |= each
    if losses := held_out(run_dir / METRICS):
        last["eval_loss"] = losses.last
    if last.get("step") is None or look.state.word in ("waiting", "preparing", "starting"):
        return [line.Fact(look.state.text, 0)], None, None
    total = look.total_steps
    times = [each["time"] for each in lines if "time" in each]
    silent = line.silent_seconds(times, time.time())
    left = runs.left_seconds(last, total, batch_sizes(config.trainer))
    share = last["step"] / total if total else None
    return line.facts(last, total, left, silent), share, silent


def watch_run(
    run_dir: Path,
    log: Callable[[], Path | None],
    interval_seconds: float,
    console: TextIO | None = None,
) -> int:
    """Watch a run until it has ended; return an exit code for how."""
    shown = RunWatch(run_dir, log, console or sys.stdout)
    code = None
    try:
        while (code := shown.step()) is None:
            time.sleep(interval_seconds)
    finally:
        shown.close(code)
    return code


# --- a sweep --------------------------------------------------------------------------------------


def watch_sweep(sweep_dir: Path, interval_seconds: float, console: TextIO | None = None) -> int:
    """Watch a sweep until no process runs it; return an exit code for how its points stand."""
    console = console or sys.stdout
    sweep = directory.read(sweep_dir)
    table = Table(console, tells_changes=True)
    was_alive, said = False, False
    try:
        while True:
            is_alive = directory.is_alive(sweep_dir)  # before its points: what ends now is seen
            with suppress(Exception):  # a search adds points to the plan
                sweep = directory.read(sweep_dir)
            states = directory.states(sweep)
            table.update(sweep, states)
            is_here = _owner_host(sweep_dir) == socket.gethostname()
            heard = any(map(runs.is_heard_of, _running(sweep, states)))
            if sweep_is_over(states, is_alive=is_alive, was_here=was_alive or is_here, heard=heard):
                break
            was_alive = was_alive or is_alive
            if not is_alive and not heard and not said:
                said = True
                table.say(f"{sweep_dir}: nothing is heard of it, and it is not of this machine")
            time.sleep(interval_seconds)
    finally:
        table.close()
    print(f"{sweep_dir}: {decisions.counts(states)}", file=console)
    if hint := decisions.how_to_continue(sweep, states, sweep.definition.max_retries):
        print(f"  {hint}", file=console)
    is_stopped = any(not state.is_over and state.state != "failed" for state in states)
    return decisions.exit_code(states, was_stopped=is_stopped)


def sweep_is_over(
    states: Sequence[PointState], *, is_alive: bool, was_here: bool, heard: bool
) -> bool:
    """Return whether nothing more comes of a sweep. Pure.

    The lock of another host does not show on every file system, so that what is not locked has
    ended only where it was seen locked, or its owner was of this host.
    """
    if is_alive or heard:
        return False
    return was_here or all(state.state not in ("waiting", "running") for state in states)


def _running(sweep: directory.Sweep, states: Sequence[PointState]) -> Iterator[Path]:
    return (sweep.run_dir(state.number) for state in states if state.state == "running")


def _owner_host(sweep_dir: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((sweep_dir / directory.LOCK).read_text())["host"])
    return None
