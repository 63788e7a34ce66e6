"""The file by which accelerate starts ranks."""

from __future__ import annotations

import yaml

from train.config import AccelerateLauncher


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
        "gpu_ids": "all",
        "main_training_function": "main",
        "mixed_precision": "no",
        "use_cpu": False,
    }
    note = "# Written for `accelerate launch`; the engine and its precision are set by the run.\n"
    return note + yaml.safe_dump(settings, sort_keys=False)
