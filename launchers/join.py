"""`shardwright join`: start this node's ranks of a run that another node has begun."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from launchers import launch, machine, preflight
from train import config as run_config


def main(arguments: Sequence[str]) -> int:
    """Start this node's ranks and wait; return their exit code."""
    options = _parser().parse_args(arguments)
    run_dir = Path(os.path.abspath(options.run_dir))
    config = run_config.load(run_dir)
    node_rank = preflight.node_rank(config, options.node_rank)
    here = machine.detect(os.environ)
    preflight.check_machine(config, here)
    # Found where the nodes share the cache.
    return launch.prepare(config) or launch.run_ranks(config, here, node_rank)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardwright join",
        description="Start this node's ranks of a run over several nodes. Its directory lies on a "
        "file system that all of them share; `shardwright train` on the first node made it.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--node-rank", type=int, metavar="N", help="with rendezvous=static")
    return parser
