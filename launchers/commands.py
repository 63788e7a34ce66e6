"""The exact command and environment of a run's ranks: pure functions of its config."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import train
from launchers.machine import Machine
from train.config import RunConfig

PACKAGES = Path(train.__file__).resolve().parent.parent
"""The folder from which `train` is imported."""


def rank_command(
    config: RunConfig,
    run_dir: Path,
    *,
    module: str = "train",
    arguments: Sequence[str] = (),
    python: str = sys.executable,
) -> list[str]:
    """Return the argv that runs all ranks of ``run_dir``, an absolute path."""
    assert run_dir.is_absolute(), "ranks may start in another directory"
    rank = [str(run_dir), *arguments]
    if config.launcher.kind == "local":
        return [python, "-m", module, *rank]
    # --standalone brings its own rendezvous on a free port of localhost. torchrun expands
    # ${local_rank} in the arguments of its ranks, and takes $$ for a plain $.
    return [
        *(python, "-m", "torch.distributed.run"),
        *("--standalone", f"--nnodes={config.launcher.nodes}"),
        f"--nproc-per-node={config.launcher.nproc_per_node}",
        *("-m", module, *(argument.replace("$", "$$") for argument in rank)),
    ]


def prepare_command(run_dir: Path, *, python: str = sys.executable) -> list[str]:
    """Return the argv that trains the tokenizer and packs the samples of ``run_dir``."""
    return [python, "-m", "train.data", str(run_dir)]


def rank_environment(
    config: RunConfig, machine: Machine, user: Mapping[str, str], *, packages: Path = PACKAGES
) -> dict[str, str]:
    """Return the variables to add to the user's environment; none that the user has set."""
    wanted = {
        **package_environment(user, packages=packages),
        "OMP_NUM_THREADS": str(max(1, machine.cores // config.launcher.world_size)),
        "PYTHONUNBUFFERED": "1",
        # Ranks fork their data loader's workers, after which tokenizers' threads deadlock.
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.launcher.kind == "torchrun":
        # Its own is 30 seconds, however long a checkpoint may take.
        wanted["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(config.launcher.grace_seconds))
    if config.launcher.device == "cpu":
        wanted["DS_ACCELERATOR"] = "cpu"
        if machine.gpus:
            wanted["CUDA_VISIBLE_DEVICES"] = ""
        if machine.has_loopback:
            # Gloo takes the address of the host's name otherwise, which need not be reachable.
            wanted["GLOO_SOCKET_IFNAME"] = "lo"
    return {
        name: value for name, value in wanted.items() if name == "PYTHONPATH" or name not in user
    }


def job_environment(
    config: RunConfig, user: Mapping[str, str], *, packages: Path = PACKAGES
) -> dict[str, str]:
    """Return the variables that a job's script sets; sbatch carries the user's own to the nodes."""
    wanted = {
        **package_environment(user, packages=packages),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.launcher.device == "cpu":
        wanted["DS_ACCELERATOR"] = "cpu"
    return {
        name: value for name, value in wanted.items() if name == "PYTHONPATH" or name not in user
    }


def package_environment(user: Mapping[str, str], *, packages: Path = PACKAGES) -> dict[str, str]:
    """Return the variables with which a child finds this very `train`.

    `python -m` looks into the working directory first, where a user may well have a train.py.
    """
    path = [str(packages), *filter(None, user.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
