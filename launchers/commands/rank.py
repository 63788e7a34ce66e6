"""`shardwright rank`: become one rank of a run, below torchrun, srun or whatever starts them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from shardwright.launchers.ranks import child
from shardwright.train.errors import FAILED
from shardwright.train.paths import absolute
from shardwright.train.program import package_environment


def main(arguments: Sequence[str]) -> int:
    """Become the process that trains, with the variables by which its launcher says who it is."""
    run_dir = absolute(parser().parse_args(arguments).run_dir)
    child.replace(
        [sys.executable, "-m", "shardwright.train", run_dir],
        package_environment(os.environ),
        inherit_all=True,
    )
    return FAILED  # not reached: this process is the rank now


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright rank`."""
    found = argparse.ArgumentParser(
        prog="shardwright rank",
        description="Run one rank of a run whose config.yaml exists already: torchrun "
        "--nproc-per-node N --no-python shardwright rank RUN_DIR. RANK, LOCAL_RANK and WORLD_SIZE "
        "say which one; without them it is the only rank. A directory with checkpoints is resumed.",
    )
    found.add_argument("run_dir", metavar="RUN_DIR")
    return found
