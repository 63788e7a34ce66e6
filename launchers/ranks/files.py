"""The files that a launcher reads."""

from __future__ import annotations

from collections.abc import Mapping

from launchers.machine.facts import Machine
from launchers.ranks.accelerate import accelerate_yaml
from launchers.ranks.deepspeed import DEEPSPEED_ENVIRONMENT, LAUNCHERS_ALONE, in_quotes
from launchers.ranks.environment import UNKNOWN
from train.config import (
    AccelerateLauncher,
    DeepspeedLauncher,
    RunConfig,
)
from train.run_directory.names import ACCELERATE_YAML


def launcher_files(
    config: RunConfig, environment: Mapping[str, str], machine: Machine = UNKNOWN
) -> dict[str, str]:
    """Return what a launcher reads from the run's directory, by file name."""
    match config.launcher:
        case AccelerateLauncher() as launcher:
            port = launcher.head_port or machine.free_port
            return {ACCELERATE_YAML: accelerate_yaml(launcher, port)}
        case DeepspeedLauncher(hostfile=str()) as launcher:
            port = launcher.head_port or machine.free_port
            wanted = dict(environment) | {"SHARDWRIGHT_RANKS_OF": launcher.backend}
            for name in LAUNCHERS_ALONE & wanted.keys():
                del wanted[name]
            if launcher.backend in ("openmpi", "slurm"):
                wanted |= {
                    "MASTER_ADDR": str(launcher.head_address),
                    "MASTER_PORT": str(port),
                }
            lines = (f"{name}={in_quotes(value)}\n" for name, value in wanted.items())
            return {DEEPSPEED_ENVIRONMENT: "".join(lines)}
    return {}
