"""The exact command of a run's ranks, and of the preparation of its data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers.kinds.launcher import UNKNOWN, Task
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.registry import launcher_of
from shardwright.train.config import RunConfig


def rank_command(
    config: RunConfig,
    run_dir: Path,
    *,
    module: str = "shardwright.train",
    arguments: Sequence[str] = (),
    python: str = sys.executable,
    node_rank: int = 0,
    machine: Machine = UNKNOWN,
) -> list[str]:
    """Return the argv that runs the ranks of ``run_dir``, an absolute path, from this node."""
    task = Task(run_dir, module, arguments)
    return launcher_of(config).command(task, python, node_rank, machine)


def prepare_command(
    run_dir: Path, *, log: Path | None = None, python: str = sys.executable
) -> list[str]:
    """Return the argv that trains the tokenizer and packs the samples of ``run_dir``.

    What it shows is appended to ``log`` as well.
    """
    shown = [f"--log={log}"] if log else []
    return [python, "-m", "shardwright.train.data", str(run_dir), *shown]
