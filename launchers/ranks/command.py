"""The exact command of a run's ranks, and of the preparation of its data."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launchers.machine.facts import Machine
from launchers.ranks.deepspeed import deepspeed_arguments
from launchers.ranks.environment import UNKNOWN
from launchers.ranks.torchrun import torchrun_arguments
from train.config import (
    AccelerateLauncher,
    DeepspeedLauncher,
    LocalLauncher,
    RunConfig,
    TorchrunLauncher,
)
from train.process.arguments import encoded
from train.program import PACKAGES
from train.run_directory.names import ACCELERATE_YAML


def rank_command(
    config: RunConfig,
    run_dir: Path,
    *,
    module: str = "train",
    arguments: Sequence[str] = (),
    python: str = sys.executable,
    node_rank: int = 0,
    machine: Machine = UNKNOWN,
) -> list[str]:
    """Return the argv that runs the ranks of ``run_dir``, an absolute path, from this node."""
    assert run_dir.is_absolute(), "ranks may start in another directory"
    rank = [str(run_dir), *arguments]
    match config.launcher:
        case LocalLauncher():
            return [python, "-m", module, *rank]
        case TorchrunLauncher() as launcher:
            return [
                python,
                *torchrun_arguments(launcher, run_dir, node_rank),
                "-m",
                module,
                *_plain(rank),
            ]
        case DeepspeedLauncher() as launcher:
            start = [python, *deepspeed_arguments(launcher, machine)]
            if launcher.hostfile is None:
                return [*start, "--module", module, *rank]
            # Its back end for srun knows no --module (launcher/multinode_runner.py, 0.19.8).
            named = [_script(module)] if launcher.backend == "slurm" else ["--module", module]
            return [*start, *named, *map(encoded, rank)]
        case AccelerateLauncher() as launcher:
            flags = [f"--config_file={run_dir / ACCELERATE_YAML}", f"--machine_rank={node_rank}"]
            return [python, "-m", "accelerate.commands.launch", *flags, "-m", module, *_plain(rank)]
    raise AssertionError("a job's script starts its ranks")


def _script(module: str) -> str:
    path = PACKAGES.joinpath(*module.split("."))
    return str(path / "__main__.py" if path.is_dir() else path.with_suffix(".py"))


def _plain(arguments: Sequence[str]) -> Iterator[str]:
    """torchrun expands ${local_rank} in the arguments of its ranks, and takes $$ for a plain $."""
    return (argument.replace("$", "$$") for argument in arguments)


def prepare_command(
    run_dir: Path, *, log: Path | None = None, python: str = sys.executable
) -> list[str]:
    """Return the argv that trains the tokenizer and packs the samples of ``run_dir``.

    What it shows is appended to ``log`` as well.
    """
    return [python, "-m", "train.data", str(run_dir), *([f"--log={log}"] if log else [])]
