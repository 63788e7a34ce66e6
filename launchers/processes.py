"""The exact command and environment of a run's ranks: pure functions of its config."""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from launchers.machine import Machine
from train.arguments import encoded
from train.config import (
    AccelerateLauncher,
    DeepspeedLauncher,
    LocalLauncher,
    RunConfig,
    TorchrunLauncher,
)
from train.program import PACKAGES

NODE_CACHE = Path(tempfile.gettempdir()) / f"shardwright-{os.getuid()}"
UNKNOWN = Machine()
ACCELERATE_YAML = "accelerate.yaml"
DEEPSPEED_ENVIRONMENT = "deepspeed.env"
"""In a run's directory: what its launcher reads."""


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
            return [python, *_torchrun(launcher, run_dir, node_rank), "-m", module, *_plain(rank)]
        case DeepspeedLauncher() as launcher:
            start = [python, *_deepspeed(launcher, machine)]
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


def _torchrun(launcher: TorchrunLauncher, run_dir: Path, node_rank: int) -> list[str]:
    start = ["-m", "torch.distributed.run"]
    counts = [f"--nproc-per-node={launcher.ranks_per_node}"]
    if launcher.max_restarts:
        counts.append(f"--max-restarts={launcher.max_restarts}")
    if launcher.bind == "numa":
        counts.append("--numa-binding=node")
    if launcher.nodes == 1:
        # It brings its own rendezvous on a free port of localhost.
        return [*start, "--standalone", "--nnodes=1", *counts]
    fewest = launcher.min_nodes or launcher.nodes
    nodes = f"{fewest}:{launcher.nodes}" if fewest < launcher.nodes else f"{launcher.nodes}"
    if launcher.rendezvous == "static":
        return [
            *(*start, f"--nnodes={nodes}", *counts, f"--node-rank={node_rank}"),
            *(f"--master-addr={launcher.head_address}", f"--master-port={launcher.head_port}"),
        ]
    # Left to itself, torchrun goes by names: on a machine that has the address of two nodes either
    # may serve the rendezvous and take it along when lost; where names differ from what the
    # machine calls itself, none does (elastic/rendezvous/c10d_rendezvous_backend.py, torch 2.13).
    serves = f"--rdzv-conf=is_host={int(node_rank == 0)}"
    # Two runs that meet at one address by mistake do not mix.
    name = hashlib.blake2b(str(run_dir).encode(), digest_size=8).hexdigest()
    return [
        *(*start, f"--nnodes={nodes}", *counts, "--rdzv-backend=c10d", f"--rdzv-id={name}"),
        *(f"--rdzv-endpoint={launcher.head_address}:{launcher.head_port}", serves),
    ]


def _deepspeed(launcher: DeepspeedLauncher, machine: Machine) -> list[str]:
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
            for name in _LAUNCHERS_ALONE & wanted.keys():
                del wanted[name]
            if launcher.backend in ("openmpi", "slurm"):
                wanted |= {
                    "MASTER_ADDR": str(launcher.head_address),
                    "MASTER_PORT": str(port),
                }
            lines = (f"{name}={_in_quotes(value)}\n" for name, value in wanted.items())
            return {DEEPSPEED_ENVIRONMENT: "".join(lines)}
    return {}


_LAUNCHERS_ALONE = {
    "DS_ENV_FILE",
    "OMPI_MCA_hwloc_base_binding_policy",
    "OMPI_MCA_plm_rsh_args",
}
"""Variables that no rank reads."""


def _in_quotes(value: str) -> str:
    """Escape what means something between the double quotes that DeepSpeed writes around values."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


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


def prepare_command(
    run_dir: Path, *, log: Path | None = None, python: str = sys.executable
) -> list[str]:
    """Return the argv that trains the tokenizer and packs the samples of ``run_dir``.

    What it shows is appended to ``log`` as well.
    """
    return [python, "-m", "train.data", str(run_dir), *([f"--log={log}"] if log else [])]


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
    return {name: value for name, value in wanted.items() if name in _IMPORTS or name not in user}


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
    return {name: value for name, value in wanted.items() if name in _IMPORTS or name not in user}


_IMPORTS = ("PYTHONPATH", "PYTHONSAFEPATH")
"""By which `train` is found whatever the user has set: an empty PYTHONSAFEPATH is none."""


def package_environment(user: Mapping[str, str], *, packages: Path = PACKAGES) -> dict[str, str]:
    """Return the variables with which a child finds this very `train`.

    `python -m` looks into the working directory first, where a user may well have a train.py.
    """
    path = [str(packages), *filter(None, user.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
