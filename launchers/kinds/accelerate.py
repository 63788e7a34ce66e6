"""launcher=accelerate: `accelerate launch`, and the file by which it starts ranks."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from shardwright.launchers.kinds import torchrun
from shardwright.launchers.kinds.launcher import UNKNOWN, Launcher, Task
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import AccelerateLauncher
from shardwright.train.run_directory.names import ACCELERATE_YAML


class Accelerate(Launcher[AccelerateLauncher]):
    """`accelerate launch`, on each node; it starts ranks as torchrun's agent does."""

    joins = True

    def command(self, task: Task, python: str, node_rank: int, machine: Machine) -> list[str]:
        return [
            *(python, "-m", "accelerate.commands.launch"),
            f"--config_file={task.run_dir / ACCELERATE_YAML}",
            f"--machine_rank={node_rank}",
            *("-m", task.module, *torchrun.plain(task.words)),
        ]

    def variables(self) -> Mapping[str, str]:
        return torchrun.patience(self.section.grace_seconds)

    def files(
        self, environment: Mapping[str, str], machine: Machine = UNKNOWN
    ) -> Mapping[str, str]:
        port = self.section.head_port or machine.free_port
        return {ACCELERATE_YAML: accelerate_yaml(self.section, port)}


def accelerate_yaml(launcher: AccelerateLauncher, port: int) -> str:
    """Return what `accelerate config` would have written; the engine is the run's own affair."""
    settings: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        # Its CPU kinds start one process, or want mpirun; this one starts ranks, on CPUs too.
        "distributed_type": "MULTI_GPU" if launcher.world_size > 1 else "NO",
        "num_machines": launcher.nodes,
        "num_processes": launcher.world_size,
        "main_process_ip": launcher.head_address or "127.0.0.1",
        "main_process_port": port,
        "rdzv_backend": "static",
        "same_network": True,
        "gpu_ids": ",".join(map(str, launcher.gpu_ids)) if launcher.gpu_ids else "all",
        "main_training_function": "main",
        "mixed_precision": "no",
        "use_cpu": False,
    }
    note = "# Written for `accelerate launch`; the engine and its precision are set by the run.\n"
    return note + yaml.safe_dump(settings, sort_keys=False)
