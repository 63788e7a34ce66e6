"""Run torchrun or its like where signals reach only the top: `shardwright relay COMMAND ...`.

SLURM with cgroup tracking signals a task's own process and nothing below it, and most launchers die
of SIGUSR1 or end their ranks at SIGTERM. In front of one, this tells the ranks themselves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shardwright.launchers.ranks import child
from shardwright.train.console import terminal


def main(argv: Sequence[str]) -> int:
    """Return the command's exit code, or 128 + the number of the signal that killed it."""
    terminal.outlive()
    options = parser().parse_args(argv)
    if not options.command:
        parser().error("a command is needed")
    code = child.run(
        options.command,
        {},
        grace_seconds=options.grace_seconds,
        inherit_all=True,  # the job has set it for the command
    ).code
    return code if code >= 0 else 128 - code


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright relay`."""
    found = argparse.ArgumentParser(prog="shardwright relay", allow_abbrev=False)
    found.add_argument("--grace-seconds", type=float, default=child.GRACE_SECONDS)
    found.add_argument("command", nargs=argparse.REMAINDER)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
