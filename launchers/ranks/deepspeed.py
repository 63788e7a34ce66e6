"""The arguments of DeepSpeed's command, and the variables that it hands on."""

from __future__ import annotations

import re

from launchers.machine.facts import Machine
from train.config import DeepspeedLauncher

DEEPSPEED_ENVIRONMENT = "deepspeed.env"
"""In a run's directory: what its launcher reads."""


def deepspeed_arguments(launcher: DeepspeedLauncher, machine: Machine) -> list[str]:
    start = ["-m", "deepspeed.launcher.runner", "--no_local_rank", "--quiet"]
    if launcher.bind_cores_to_rank:
        start.append("--bind_cores_to_rank")
    port = launcher.head_port or machine.free_port
    start.append(f"--master_port={port}")
    if launcher.hostfile is None:
        # It takes /job/hostfile, where that is, if none is named; /dev/null counts as none.
        start.append("--hostfile=/dev/null")
        # Beside --num_accelerators it ignores CUDA_VISIBLE_DEVICES (launcher/runner.py, 0.19.8).
        if launcher.device == "cuda" and machine.cuda_visible_devices:
            chosen = machine.cuda_visible_devices.split(",")[: launcher.ranks_per_node]
            return [*start, f"--include=localhost:{','.join(name.strip() for name in chosen)}"]
        return [*start, f"--num_accelerators={launcher.ranks_per_node}"]
    flags = {
        "hostfile": launcher.hostfile,
        "include": launcher.include,
        "exclude": launcher.exclude,
        "launcher": launcher.backend,
        "launcher_args": _backend_arguments(launcher) or None,
        "master_addr": launcher.head_address,
        "ssh_port": launcher.ssh_port,
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    if launcher.backend == "slurm":
        given.append("--no_ssh_check")
    # A hostfile of one host may name another machine than this one.
    return [*start, *given, "--force_multi"]


def _backend_arguments(launcher: DeepspeedLauncher) -> str:
    if launcher.backend != "slurm":
        return launcher.backend_arguments
    # srun is told the number of ranks only, and may put them anywhere in the allocation; of equal
    # flags it takes the last.
    counts = f"--nodes={launcher.nodes} --ntasks-per-node={launcher.ranks_per_node}"
    return f"{counts} --kill-on-bad-exit=1 {launcher.backend_arguments}".rstrip()


LAUNCHERS_ALONE = {
    "DS_ENV_FILE",
    "OMPI_MCA_hwloc_base_binding_policy",
    "OMPI_MCA_plm_rsh_args",
}
"""Variables that no rank reads."""


def in_quotes(value: str) -> str:
    """Escape what means something between the double quotes that DeepSpeed writes around values."""
    return re.sub(r'([\\"$`])', r"\\\1", value)
