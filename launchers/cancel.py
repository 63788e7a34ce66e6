"""`shardwright cancel`: stop a run for good, after a checkpoint or at once."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from launchers import slurm, status
from train import config as run_config
from train import owner, stop, stop_request
from train.errors import FAILED, UserError

POLL_SECONDS = 0.5
SLACK_SECONDS = 60.0
"""For the job's own end, beyond the grace period of its ranks."""


def main(arguments: Sequence[str]) -> int:
    """Stop a run, or every run of a sweep; return 1 where one goes on in spite of it."""
    options = _parser().parse_args(arguments)
    code = 0
    for run_dir in status.runs_in(Path(os.path.abspath(options.run_dir))):
        code = max(code, cancel(run_dir, now=options.now))
    return code


def cancel(run_dir: Path, *, now: bool) -> int:
    """Stop one run and wait until it has; return 1 where it goes on all the same.

    Raises UserError where it does not run, as far as can be seen from this machine.
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
        return _wait(run_dir, partial(_is_over, job.id))
    ranks = status.rank_processes(run_dir)
    if not ranks:

        def is_asked() -> bool:
            by = f"shardwright cancel on {socket.gethostname()}"
            is_alive = _is_alive_elsewhere(run_dir)
            return is_alive and stop_request.request(run_dir, by, kill=now)

        if is_asked():
            return _wait(run_dir, lambda: not is_asked())
        raise UserError(
            f"{run_dir} does not run: no job in the queue and no process here or elsewhere"
            + (f" (job {job.id} is {job.state})" if job else "")
        )
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if now else signal.SIGUSR1)
    return _wait(run_dir, lambda: not status.rank_processes(run_dir))


def _is_alive_elsewhere(run_dir: Path) -> bool:
    """Return whether the first rank of a run lives on another machine.

    It holds a lock, which not every file system shows to other nodes; it is heard of then.
    """
    first, is_locked = owner.look(run_dir)
    if is_locked or first is None or first.host == socket.gethostname():
        return is_locked
    return status.is_heard_of(run_dir)


def _is_over(job: str) -> bool:
    found = slurm.look(job)
    return found is None or found.is_over


def _wait(run_dir: Path, is_over: Callable[[], bool]) -> int:
    seconds = run_config.load(run_dir).launcher.grace_seconds + SLACK_SECONDS
    deadline = time.monotonic() + seconds
    while not is_over():
        if time.monotonic() > deadline:
            quoted = shlex.quote(str(run_dir))
            print(
                f"it has not stopped within {seconds:.0f} s; look with `shardwright logs {quoted}`"
                f", or end it with `shardwright cancel {quoted} --now`",
                file=sys.stderr,
            )
            return FAILED
        time.sleep(POLL_SECONDS)
    stopped = stop.read(run_dir)
    if stopped is None and status.is_done(run_dir, run_config.load(run_dir)):
        print("it was done before it could be stopped")
        return 0
    where = f"stopped at step {stopped.step}" if stopped else "ended"
    print(f"{where}; go on with: shardwright resume {shlex.quote(str(run_dir))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardwright cancel",
        description="Stop a run: its ranks write a checkpoint, and its job does not go on.",
        epilog="Exit codes: 0 stopped, 1 it goes on all the same, 2 it does not run.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="or a sweep, with all its runs")
    parser.add_argument("--now", action="store_true", help="at once, without a checkpoint")
    return parser
