"""`shardwright logs`: what a run, its job or one of its ranks has printed, and still prints."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from shardwright.launchers import runs
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute
from shardwright.train.run_directory.names import ALL_LOGS, JOB_LOGS, LOGS, RUN_LOG, rank_log

POLL_SECONDS = 0.5


def main(arguments: Sequence[str]) -> int:
    """Print a log; with --follow until the run is over."""
    options = parser().parse_args(arguments)
    run_dir = Path(absolute(options.run_dir))
    found = runs.runs_in(run_dir)
    if found != [run_dir]:
        raise UserError(f"{run_dir} holds {len(found)} runs; give one of them, such as {found[0]}")
    if not options.follow:
        sys.stdout.buffer.write(_existing(run_dir, options.rank).read_bytes())
        return 0
    follow(
        lambda: log_of(run_dir, options.rank),
        sys.stdout.buffer,
        is_over=lambda: runs.of(run_dir).is_over,
    )
    return 0


def log_of(run_dir: Path, rank: int | None) -> Path | None:
    """Return a rank's log, or else what was last shown of the run, here or by a job.

    That is rank 0's log where an earlier version has kept nothing else; None where there is none.
    """
    logs = run_dir / LOGS
    if rank is None:
        # A job resumed here, or a run of here by a job, has both.
        shown = [path for path in (logs / RUN_LOG, *logs.glob(JOB_LOGS)) if path.exists()]
        if shown:
            return max(shown, key=lambda path: path.stat().st_mtime)
    path = logs / rank_log(rank or 0)
    return path if path.exists() else None


def follow(find: Callable[[], Path | None], out: BinaryIO, *, is_over: Callable[[], bool]) -> None:
    """Copy a log as it grows, from the moment that it exists, until the run is over."""
    read_bytes, last, before = 0, False, None
    while True:
        path = find()
        if path is not None:
            if path != before:  # the run was resumed elsewhere
                read_bytes, before = 0, path
            with path.open("rb") as file:
                file.seek(read_bytes)
                text = file.read()
            out.write(text)
            out.flush()
            read_bytes += len(text)
        if last:
            return
        # Once more after the end: it may have written in between.
        last = is_over()
        if not last:
            time.sleep(POLL_SECONDS)


def _existing(run_dir: Path, rank: int | None) -> Path:
    path = log_of(run_dir, rank)
    if path is not None:
        return path
    there = sorted(p.name for p in (run_dir / LOGS).glob(ALL_LOGS))
    what = f"no {LOGS}/{rank_log(rank)}" if rank is not None else "no log yet"
    hint = f"there are {', '.join(there)}" if there else "--follow waits for it"
    raise UserError(f"{run_dir} has {what}; {hint}")


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright logs`."""
    found = argparse.ArgumentParser(
        prog="shardwright logs",
        description="Print what a run has shown on its terminal, or its job's log, or a rank's.",
    )
    found.add_argument("run_dir", metavar="RUN_DIR")
    found.add_argument("--rank", type=int, metavar="N", help="the rank's own log")
    found.add_argument(
        "-f", "--follow", action="store_true", help="continue until the run is over; Ctrl-C stops"
    )
    return found
