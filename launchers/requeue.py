"""`shardwright requeue RUN_DIR --restarts N`: whether a job that was cut may start again."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from shardwright.train.checkpoint.format import layout
from shardwright.train.console import terminal
from shardwright.train.process.arguments import path as path_of
from shardwright.train.run_directory import history
from shardwright.train.run_directory.names import CHECKPOINTS

LIMIT = 100


def should_requeue(
    entries: Sequence[Mapping[str, Any]], newest_step: int, *, restarts: int, limit: int
) -> tuple[bool, str]:
    """Return whether to start again, and why or why not. Pure.

    ``entries`` are the lines of history.jsonl, oldest first, ``newest_step`` is the step of the
    newest whole checkpoint (0: there is none) and ``restarts`` counts those that have been. Between
    two restarts of a job there must be a newer checkpoint, whatever torchrun restarts within it;
    before the first one there need not.
    """
    if restarts >= limit:
        return False, f"restarted {restarts} times, which is the limit"
    of_jobs = [entry for entry in entries if entry.get("by") != history.BY_TORCHRUN]
    last = of_jobs[-1] if of_jobs else {}
    before = last.get("requeued_at_step")
    if before is not None and newest_step <= before:
        return False, (
            f"no progress since the last restart: the newest whole checkpoint was of step {before} "
            f"and is of step {newest_step}; a checkpoint must fit between two stops (lower "
            "trainer.save_every_steps or raise launcher.grace_seconds)"
        )
    return True, f"resumes from step {newest_step} (restart {restarts + 1} of at most {limit})"


def main(argv: Sequence[str]) -> int:
    """Print the reason and return 0 where the job is to start again, which is noted, or else 1."""
    terminal.outlive()
    options = parser().parse_args(argv)
    whole = layout.whole_checkpoints(options.run_dir / CHECKPOINTS)
    newest_step = whole[-1][0] if whole else 0
    yes, reason = should_requeue(
        history.read(options.run_dir),
        newest_step,
        restarts=options.restarts,
        limit=options.limit,
    )
    print(reason)
    if yes:
        entry = {
            "time": time.time(),
            "requeued_at_step": newest_step,
            "checkpoint": whole[-1][1].name if whole else None,
            "restart": options.restarts + 1,
        }
        history.append(options.run_dir, entry)
    return 0 if yes else 1


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright requeue`."""
    found = argparse.ArgumentParser(prog="shardwright requeue", description=__doc__)
    found.add_argument("run_dir", type=path_of)
    found.add_argument("--restarts", type=int, required=True, help="how many there have been")
    found.add_argument("--limit", type=int, default=LIMIT, help="how many there may be")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
