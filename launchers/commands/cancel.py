"""`shardwright cancel`: stop a run for good, after a checkpoint or at once."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from shardwright.launchers import messages, runs
from shardwright.launchers.ranks import child
from shardwright.launchers.ranks.processes import rank_processes
from shardwright.launchers.slurm import jobs as slurm
from shardwright.train import config as run_config
from shardwright.train import program
from shardwright.train.console import terminal
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.paths import absolute
from shardwright.train.run_directory import owner, stop_note, stop_request

POLL_SECONDS = 0.5
SLACK_SECONDS = 60.0
"""For the job's own end, beyond the grace period of its ranks."""


class NotRunning(UserError):
    """There is nothing to stop."""


def main(arguments: Sequence[str]) -> int:
    """Stop a run, or every run of a sweep; return 1 where one continues all the same."""
    options = parser().parse_args(arguments)
    terminal.outlive()
    asked_for = Path(absolute(options.run_dir))
    found = runs.runs_in(asked_for)
    if found == [asked_for]:
        return _wait(asked_for, _begin(asked_for, now=options.now))
    return _cancel_all(asked_for, found, now=options.now)


def _cancel_all(sweep: Path, run_dirs: Sequence[Path], *, now: bool) -> int:
    """Stop what runs of a sweep, all of it before any is waited for; return the exit code."""
    code = 0
    begun: dict[Path, Callable[[], bool]] = {}
    for run_dir in run_dirs:
        try:
            begun[run_dir] = _begin(run_dir, now=now)
        except NotRunning:
            continue
        except UserError as error:
            print(messages.error_text(f"{run_dir}: {error}"), file=sys.stderr)
            code = BAD_INPUT
    if not begun and code == 0:
        raise NotRunning(
            f"none of the {len(run_dirs)} runs in {sweep} is running, here or elsewhere"
        )
    for run_dir, is_over in begun.items():
        print(f"{run_dir}: ", end="", flush=True)
        try:
            code = max(code, _wait(run_dir, is_over))
        except UserError as error:
            print(messages.error_text(str(error)), file=sys.stderr)
            code = BAD_INPUT
    return code


def _begin(run_dir: Path, *, now: bool) -> Callable[[], bool]:
    """Ask a run to stop; return what tells whether it has.

    Raises NotRunning where it does not run, as far as can be seen from this machine.
    """
    known = slurm.job_of(run_dir)
    job = slurm.look(known) if known is not None else None
    if job is not None and not job.is_over:
        # Before the signal: the job's script looks for it when its ranks have stopped.
        slurm.note_cancelled(run_dir)
        if now:
            slurm.cancel(job)
        else:
            print(f"job {job.id} is {job.state}", flush=True)
            slurm.stop(job)
        return partial(_is_over, job.id)
    if not _request_stop(run_dir, now=now):
        raise NotRunning(
            f"{run_dir} is not running: no job in the queue and no process here or elsewhere"
            + (f" (job {job.id} is {job.state})" if job else "")
        )
    return lambda: not _request_stop(run_dir, now=now)


def _request_stop(run_dir: Path, *, now: bool) -> bool:
    """Ask a run to stop, whatever it is just doing; return whether it lives.

    Its first rank, or what prepares its data, watches its directory from any node. To be called
    until the run is over: it may be about to start what then watches. Ranks of this machine are
    signalled where nobody watches, as a disk may be full.
    """
    by = f"shardwright cancel on {socket.gethostname()}"
    first, is_locked = owner.look(run_dir)
    ranks = rank_processes(run_dir)
    if not is_locked and not ranks:
        # Not every file system shows locks to other nodes; it is heard of then.
        is_elsewhere = first is not None and first.host != socket.gethostname()
        may_live = is_elsewhere and runs.is_heard_of(run_dir)
        return may_live and stop_request.request(run_dir, by, kill=now)
    is_watched = stop_request.request(run_dir, by, kill=now)
    for pid in ranks:
        with suppress(ProcessLookupError):
            if now:
                os.kill(pid, signal.SIGKILL)
            elif not is_watched and child.listens(pid):
                os.kill(pid, signal.SIGUSR1)
    return True


def _is_over(job: str) -> bool:
    found = slurm.look(job)
    return found is None or found.is_over


def _wait(run_dir: Path, is_over: Callable[[], bool]) -> int:
    seconds = run_config.load(run_dir).launcher.grace_seconds + SLACK_SECONDS
    deadline = time.monotonic() + seconds
    while not is_over():
        if time.monotonic() > deadline:
            print(
                f"it has not stopped within {seconds:.0f} s; see its log with "
                f"`{program.command('logs', str(run_dir))}`, or end it with "
                f"`{program.command('cancel', str(run_dir), '--now')}`",
                file=sys.stderr,
            )
            return FAILED
        time.sleep(POLL_SECONDS)
    stopped = stop_note.read(run_dir)
    if stopped is None and runs.is_done(run_dir, run_config.load(run_dir)):
        print("it finished before it could be stopped")
        return 0
    where = "ended"
    if stopped is not None:
        where = str(stopped).partition(" by ")[0]
    print(f"{where}; resume with: {program.command('resume', str(run_dir))}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright cancel`."""
    found = argparse.ArgumentParser(
        prog="shardwright cancel",
        description="Stop a run: its ranks write a checkpoint, and its job does not start again.",
        epilog="Exit codes: 0 stopped, 1 still running, 2 not running.",
    )
    found.add_argument("run_dir", metavar="RUN_DIR", help="or a sweep, with all its runs")
    found.add_argument("--now", action="store_true", help="at once, without a checkpoint")
    return found
