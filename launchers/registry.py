"""Which module starts the ranks of a config: the kinds of launchers."""

from __future__ import annotations

from typing import Any

from shardwright.launchers.kinds.accelerate import Accelerate
from shardwright.launchers.kinds.deepspeed import Deepspeed
from shardwright.launchers.kinds.launcher import Launcher
from shardwright.launchers.kinds.local import Local
from shardwright.launchers.kinds.torchrun import Torchrun
from shardwright.launchers.slurm.launcher import Slurm
from shardwright.train.config import RunConfig

LAUNCHERS: dict[str, type[Launcher[Any]]] = {
    "local": Local,
    "torchrun": Torchrun,
    "deepspeed": Deepspeed,
    "accelerate": Accelerate,
    "slurm": Slurm,
}
"""By the ``kind`` of the config's section."""


def launcher_of(config: RunConfig) -> Launcher[Any]:
    """Return what starts the ranks of a run."""
    return LAUNCHERS[config.launcher.kind](config, config.launcher)


def joining() -> list[str]:
    """Return the kinds of which each node starts its own ranks."""
    return [kind for kind, launcher in LAUNCHERS.items() if launcher.joins]
