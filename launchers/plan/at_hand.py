"""The hardware that a run is about to have: this machine's, its job's, or what its user says."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwright.launchers.machine.facts import Machine, given_to
from shardwright.launchers.plan import hardware, kept
from shardwright.launchers.plan.hardware import GIB, GROUP, MIB, Hardware
from shardwright.train.config import devices
from shardwright.train.config.launcher import LauncherConfig
from shardwright.train.errors import UserError

SAY = f"say it with {GROUP}=NAME, such as {GROUP}=h200, or {GROUP}=FILE.yaml"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def at_hand(
    launcher: LauncherConfig, here: Machine, said: Hardware | None, asking: str
) -> tuple[Hardware, str]:
    """Return the hardware of a run, and how it is known.

    ``launcher`` is resolved; ``said`` is what the user says it is. ``asking`` is the setting that
    has to know it. Raises UserError where too little is known.
    """
    sizes = {"devices": launcher.ranks_per_node, "nodes": _fewest_nodes(launcher)}
    if said is not None:
        return _as_said(said, launcher, sizes), f"as {GROUP}= says"
    if launcher.is_job:
        found, how = _of_job(launcher, asking)
    elif launcher.is_elsewhere:
        raise UserError(
            f"{asking}=auto: what the hosts of launcher.hostfile have is not known here; {SAY}"
        )
    elif launcher.device == "cuda":
        found, how = _of_gpus(launcher.ranks_per_node, given_to(here, launcher), asking)
    else:
        found, how = _of_cores(launcher.ranks_per_node, here)
    return _sized(found, sizes), how


def _fewest_nodes(launcher: LauncherConfig) -> int:
    """Return on how few nodes a run may have to fit: a lost one is gone on without."""
    return max(1, min(launcher.world_sizes) // launcher.ranks_per_node)


def _as_said(said: Hardware, launcher: LauncherConfig, sizes: Mapping[str, int]) -> Hardware:
    if said.device != launcher.device:
        raise UserError(
            f"{GROUP}= has {GROUP}.device={said.device}, but the ranks run on "
            f"launcher.device={launcher.device}; change one of them"
        )
    for name, key in (("devices", "nproc_per_node"), ("nodes", "nodes")):
        counted = getattr(said, name)
        if counted not in (1, sizes[name]):
            raise UserError(
                f"{GROUP}= has {counted} {name}, but launcher.{key} comes to {sizes[name]}: how "
                f"many there are is the launcher's to say; leave it out of {GROUP}=, or set "
                f"launcher.{key}={counted}"
            )
    return _sized(said, sizes)


def _sized(found: Hardware, sizes: Mapping[str, int]) -> Hardware:
    return hardware.from_tree({**found.model_dump(), **sizes})


# --- this machine ---------------------------------------------------------------------------------


def _of_gpus(ranks: int, here: Machine, asking: str) -> tuple[Hardware, str]:
    if (found := kept.matching(here, "cuda")) is not None:
        return found, f"as measured in {kept.place('cuda')}"
    names = sorted(set(here.gpu_names[:ranks]))
    if len(names) > 1:
        raise UserError(f"{asking}=auto: the GPUs are not alike ({', '.join(names)}); {SAY}")
    if not names:
        raise UserError(f"{asking}=auto: nothing says what the GPUs here are; {SAY}")
    option = devices.option_of(names[0])
    if option is None:
        raise UserError(
            f"{asking}=auto: nothing is known of {names[0]}; measure it once with "
            f"`shardwright plan {GROUP}=here`, or {SAY}"
        )
    found = hardware.shipped(option)
    return with_host(found, here), f"{names[0]}, as conf/{GROUP}/{option}.yaml"


def _of_cores(ranks: int, here: Machine) -> tuple[Hardware, str]:
    if (found := kept.matching(here, "cpu")) is not None:
        return kept.shared(found, ranks), f"as measured in {kept.place('cpu')}"
    found = with_host(hardware.shipped("cpu"), here)
    how = f"this machine's memory, at a speed that is assumed; `shardwright plan {GROUP}=here`"
    return found, f"{how} measures it"


def with_host(found: Hardware, here: Machine, place: Path | None = None) -> Hardware:
    """Return hardware with the memory and the disk that this machine has."""
    tree = found.model_dump()
    if here.ram_bytes is not None:
        tree["host_memory_gib"] = here.ram_bytes / GIB
    if found.memory_mib is not None and here.gpu_memory_bytes is not None:
        tree["memory_mib"] = min(found.memory_mib, here.gpu_memory_bytes // MIB)
    tree["nvme_gib"] = max(0.001, shutil.disk_usage(place or Path.cwd()).free / GIB)
    return hardware.from_tree(tree)


# --- a job's --------------------------------------------------------------------------------------


def _of_job(launcher: LauncherConfig, asking: str) -> tuple[Hardware, str]:
    memory = launcher.asked_memory
    if launcher.device == "cpu":
        if memory in (None, "all"):
            raise UserError(
                f"{asking}=auto: how much memory the job's nodes have is not known here; set "
                f"launcher.memory_per_node, such as 64G, or {SAY.replace('h200', 'cpu')}"
            )
        return _with_memory(hardware.shipped("cpu"), memory), "launcher.memory_per_node"
    kind = launcher.asked_gpus
    if kind is None:
        raise UserError(
            f"{asking}=auto: which GPUs the job will have is not known here; set launcher.gpu_type "
            f"as the cluster calls them, or {SAY}"
        )
    options = _called(kind)
    if len(options) != 1:
        there_are = f"may be {' or '.join(options)}" if options else "is nothing that is known"
        raise UserError(f"{asking}=auto: launcher.gpu_type={kind} {there_are}; {SAY}")
    found = hardware.shipped(options[0])
    return _with_memory(found, memory), f"launcher.gpu_type={kind}, as {options[0]}.yaml"


def _called(gpu_type: str) -> list[str]:
    """Return the options that a cluster's name for GPUs may mean: h100, nvidia_h100_80gb_hbm3."""
    words = gpu_type.lower().replace("-", "_")
    known = [name for name in hardware.options() if name != "cpu"]
    if words in known:
        return [words]
    by_name = devices.option_of(gpu_type.upper().replace("_", " "))
    within = [name for name in known if name.startswith(f"{words}_")]
    return within if within or by_name is None else [by_name]


def _with_memory(found: Hardware, memory: str | None) -> Hardware:
    if memory in (None, "all"):
        return found
    assert memory is not None
    tree: dict[str, Any] = found.model_dump()
    limit = int(memory[:-1]) * UNITS[memory[-1]] / GIB
    return hardware.from_tree({**tree, "host_memory_gib": limit})
