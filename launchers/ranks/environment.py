"""The environment of a run's ranks: a pure function of its config."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from launchers.machine.facts import Machine
from launchers.ranks.deepspeed import DEEPSPEED_ENVIRONMENT
from train.config import RunConfig
from train.program import IMPORTS, PACKAGES, package_environment

NODE_CACHE = Path(tempfile.gettempdir()) / f"shardwright-{os.getuid()}"
UNKNOWN = Machine()


def rank_environment(
    config: RunConfig, machine: Machine, user: Mapping[str, str], *, packages: Path = PACKAGES
) -> dict[str, str]:
    """Return the variables to add to the user's environment; none that the user has set."""
    wanted = {
        **package_environment(user, packages=packages),
        "OMP_NUM_THREADS": str(max(1, machine.cores // config.launcher.ranks_per_node)),
        "PYTHONUNBUFFERED": "1",
        # Ranks fork their data loader's workers, after which tokenizers' threads deadlock.
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.launcher.kind in ("torchrun", "accelerate"):
        # Its own is 30 seconds, however long a checkpoint may take.
        wanted["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(config.launcher.grace_seconds))
    if config.launcher.kind == "torchrun" and config.launcher.nodes > 1:
        # An agent that stays keeps where the ranks met and tells a node that comes back nothing,
        # which then waits in vain (elastic/rendezvous/dynamic_rendezvous.py, torch 2.13).
        wanted["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if config.launcher.nodes > 1:
        wanted |= _caches(NODE_CACHE)
        if machine.interface is not None:
            wanted |= {f"{name}_SOCKET_IFNAME": machine.interface for name in ("GLOO", "NCCL")}
    if config.launcher.device == "cpu":
        wanted["DS_ACCELERATOR"] = "cpu"
        if machine.gpus:
            wanted["CUDA_VISIBLE_DEVICES"] = ""
        if machine.has_loopback and config.launcher.nodes == 1:
            # Gloo takes the address of the host's name otherwise, which need not be reachable.
            wanted["GLOO_SOCKET_IFNAME"] = "lo"
    if config.launcher.kind == "deepspeed" and config.launcher.hostfile is not None:
        # DeepSpeed looks for it in the working directory and at home otherwise.
        wanted["DS_ENV_FILE"] = str(Path(str(config.run_dir)) / DEEPSPEED_ENVIRONMENT)
        if config.launcher.backend == "openmpi":
            # mpirun gives each of two ranks a single core otherwise, whatever their threads.
            wanted["OMPI_MCA_hwloc_base_binding_policy"] = "none"
            if config.launcher.ssh_port is not None:
                # DeepSpeed tells the port to pdsh only.
                wanted["OMPI_MCA_plm_rsh_args"] = f"-p {config.launcher.ssh_port}"
    return {name: value for name, value in wanted.items() if name in IMPORTS or name not in user}


def _caches(folder: Path) -> dict[str, str]:
    """Keep what a node compiles on the node: nodes may differ, and home be a slow disk."""
    return {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }


def job_environment(
    config: RunConfig,
    user: Mapping[str, str],
    *,
    packages: Path = PACKAGES,
    cache: Path = NODE_CACHE,
) -> dict[str, str]:
    """Return the variables that a job's script sets; sbatch carries the user's own to the nodes."""
    wanted = {
        **package_environment(user, packages=packages),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.launcher.device == "cpu":
        wanted["DS_ACCELERATOR"] = "cpu"
    if config.launcher.nodes > 1:
        wanted |= _caches(cache)
    if config.launcher.kind == "slurm" and config.launcher.starts == "torchrun":
        wanted["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(config.launcher.grace_seconds))
    return {name: value for name, value in wanted.items() if name in IMPORTS or name not in user}
