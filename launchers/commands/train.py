"""`shardwright train`: its command line, and what `--dry-run` shows in place of a start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from shardwright.launchers import starting
from shardwright.launchers.commands import measured
from shardwright.launchers.composition.compose import command_line, compose, config_dir
from shardwright.launchers.dry_run import show
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.plan import hardware

SWEEP_EXISTS = (
    "note: -m runs one after the other and cannot be continued as a whole; `shardwright sweep` "
    "with the same words runs several at a time, and resumes"
)


def main(arguments: Sequence[str]) -> int:
    """Start what the arguments ask for, or with --dry-run show it; return the exit code."""
    dry_run = "--dry-run" in arguments
    said, others = hardware.split([a for a in arguments if a != "--dry-run"])
    jobs = compose(others)
    here = machine.detect(os.environ)
    runs = starting.Runs.of(jobs, here, measured.chosen(said, config_dir(others), here))
    for line in runs.reasons:
        print(f"# {line}" if dry_run else line)
    if runs.are_of_a_multirun:
        print(SWEEP_EXISTS, file=sys.stderr)
    if dry_run:
        show(runs.configs, here)
    starting.check(runs.configs, here)
    return 0 if dry_run else starting.start(runs, here)


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright train`: Hydra's flags and ours."""
    found = command_line()
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="show config, engine settings and command, and start nothing",
    )
    return found
