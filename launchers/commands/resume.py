"""`shardwright resume`: its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers.composition.errors import refuse_dashes
from shardwright.launchers.resuming import Asked, resume
from shardwright.train.errors import UserError
from shardwright.train.process.arguments import path as path_of


def main(arguments: Sequence[str]) -> int:
    """Resume from a whole checkpoint, or with --dry-run show how; return the exit code."""
    refuse_dashes(arguments)
    options = parser().parse_intermixed_args(arguments)
    if options.run_dir is None or (
        "=" in options.run_dir and not path_of(options.run_dir).is_dir()
    ):
        raise UserError(
            "resume needs the run's directory first: shardwright resume RUN_DIR [key=value]"
        )
    return resume(
        Asked(
            Path(options.run_dir),
            options.overrides,
            options.step,
            options.config_dir,
            dry_run=options.dry_run,
        )
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright resume`."""
    found = argparse.ArgumentParser(
        prog="shardwright resume",
        usage="%(prog)s RUN_DIR|CHECKPOINT [--step N] [--dry-run] [--config-dir DIR] "
        "[group=option] [key=value] ...",
        description="Resume a run from its newest whole checkpoint, or from the one that is "
        "chosen, in its own directory. Ranks, strategy, precision, batch, length and cadences may "
        "change; what would change what was learned (model, tokenizer, data and their order, "
        "optimizer) may not.",
        epilog="Examples: shardwright resume runs/a strategy=zero3 launcher.nproc_per_node=4; "
        "shardwright resume runs/a trainer.max_steps=20000; shardwright resume runs/a --step 500. "
        "Exit codes: those of `shardwright train`; 2 leaves the run as it was.",
    )
    found.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="or one of its checkpoints")
    found.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    found.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help="the checkpoint to resume from, by its step; newer ones, and what metrics.jsonl says "
        "of later steps, are set aside in RUN_DIR/set-aside/",
    )
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="print config, engine settings, command and checkpoint, and start nothing",
    )
    found.add_argument(
        "--config-dir", "-cd", metavar="DIR", help="a folder with options of your own, as for train"
    )
    return found


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text} is not the number of a step; a checkpoint's path stands in place of RUN_DIR"
        )
    return int(text)
