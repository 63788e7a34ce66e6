"""`shardwright join`: start this node's ranks of a run that another node has begun."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers import launch, preflight
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.registry import joining, launcher_of
from shardwright.train import config as run_config
from shardwright.train.config import RunConfig
from shardwright.train.console import terminal
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute


def main(arguments: Sequence[str]) -> int:
    """Start this node's ranks and wait; return their exit code."""
    options = parser().parse_args(arguments)
    run_dir = Path(absolute(options.run_dir))
    config = run_config.load(run_dir)
    node_rank = node_rank_of(config, options.node_rank)
    here = machine.detect(os.environ)
    preflight.check_machine(config, here)
    terminal.outlive()
    # Found where the nodes share the cache.
    return launch.prepare(config, None) or launch.run_ranks(config, here, None, node_rank)


def node_rank_of(config: RunConfig, asked: int | None) -> int:
    """Return the rank of a node that joins a run.

    Raises UserError where the run has no other nodes, or the rank is none of theirs.
    """
    launcher, nodes = launcher_of(config), config.launcher.nodes
    name = f"launcher={config.launcher.kind}"
    if not launcher.joins or nodes == 1:
        others = " and ".join(f"launcher={kind}" for kind in joining())
        raise UserError(
            f"{name} of {config.run_dir} starts all of its ranks itself; join is for {others} "
            "with launcher.nodes above 1"
        )
    if asked is None and launcher.gives_node_ranks:
        raise UserError(
            f"{name} gives each node its rank; add --node-rank N, from 1 to {nodes - 1}"
        )
    if asked is not None and not 1 <= asked < nodes:
        raise UserError(
            f"--node-rank {asked}, but the run has {nodes} nodes and its first one is 0; give 1 to "
            f"{nodes - 1}"
        )
    return asked or 1


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright join`."""
    found = argparse.ArgumentParser(
        prog="shardwright join",
        description="Start this node's ranks of a run over several nodes. Its directory lies on a "
        "file system that all of them share; `shardwright train` on the first node made it.",
    )
    found.add_argument("run_dir", metavar="RUN_DIR")
    found.add_argument("--node-rank", type=int, metavar="N", help="with rendezvous=static")
    return found
