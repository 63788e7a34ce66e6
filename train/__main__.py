"""A rank's entry: `python -m train RUN_DIR`, alone or under torchrun."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import BAD_INPUT, FAILED, UserError

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.rank import Rank


def main(argv: list[str]) -> int:
    """Run one rank; return 0, 1 where it failed, or 2 on bad input."""
    if len(argv) != 1:
        print("usage: python -m train RUN_DIR", file=sys.stderr)
        return BAD_INPUT
    run_dir = Path(argv[0])

    from train import config
    from train.owner import owned
    from train.rank import rank_from_environment

    rank = rank_from_environment()
    try:
        settings = config.load(run_dir)
        with owned(run_dir, print) if rank.index == 0 else nullcontext():
            return _run(run_dir, settings, rank)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _run(run_dir: Path, settings: RunConfig, rank: Rank) -> int:
    from train import logs
    from train.rank import join

    console = logs.open_rank_log(run_dir, rank.index)
    try:
        with join(settings, rank):
            from train.run import run

            run(run_dir, rank, console)
    except Exception as error:
        logs.log.exception("rank %d failed", rank.index)
        logs.note_failure(run_dir, rank.index, error)
        print(f"rank {rank.index} failed: {type(error).__name__}: {error}", file=console)
        return BAD_INPUT if isinstance(error, UserError) else FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
