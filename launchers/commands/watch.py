"""`shardwright watch`: what a run or a sweep shows on its own terminal, from anywhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers import runs
from shardwright.launchers.commands.logs import log_of
from shardwright.launchers.sweep import directory
from shardwright.launchers.watching.watch import watch_run, watch_sweep
from shardwright.train.errors import INTERRUPTED, UserError
from shardwright.train.paths import absolute

LEAST_SECONDS = 0.1


def main(arguments: Sequence[str]) -> int:
    """Watch until what is watched has ended, or Ctrl-C."""
    options = parser().parse_args(arguments)
    path = Path(absolute(options.directory))
    if options.interval < LEAST_SECONDS:
        raise UserError(f"--interval {options.interval:g} must be at least {LEAST_SECONDS:g}")
    try:
        if directory.is_sweep(path):
            return watch_sweep(path, options.interval)
        found = runs.runs_in(path)
        if found != [path]:
            raise UserError(
                f"{path} holds {len(found)} runs that are no sweep of `shardwright sweep`; watch "
                f"one of them, such as {found[0]}, or see all with `shardwright runs {path}`"
            )
        return watch_run(path, lambda: log_of(path, None), options.interval)
    except KeyboardInterrupt:
        print(f"no longer watched; {path} goes on by itself", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright watch`."""
    found = argparse.ArgumentParser(
        prog="shardwright watch",
        description="Show a run or a sweep that runs elsewhere, in another terminal, on another "
        "node or as a job, until it has ended: step, losses, speed, memory and time left below "
        "what it logs, or a table of a sweep's points. Its files are read and nothing is changed; "
        "Ctrl-C ends the watching alone.",
        epilog="Exit codes: 0 done, 1 failed, 75 stopped and to be resumed, 130 Ctrl-C.",
    )
    found.add_argument("directory", metavar="RUN_DIR|SWEEP_DIR")
    found.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between two looks at its files (default: 1)",
    )
    return found
