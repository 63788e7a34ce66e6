"""Where the points of a sweep run: here, on the hosts of a hostfile, or as jobs of a cluster."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.registry import launcher_of
from shardwright.launchers.sweep import hosts, locally
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.locally import Slot
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError


def check_launchers(configs: Sequence[RunConfig]) -> None:
    """Raise UserError where points cannot be started by one place. Configs as they are given."""
    kinds = sorted({config.launcher.kind for config in configs})
    queues = {launcher_of(config).queue is not None for config in configs}
    if len(queues) > 1:
        raise UserError(
            f"launcher={','.join(kinds)}: the points of a sweep are started here or as jobs, not "
            "both; choose one launcher, or two sweeps"
        )
    for config in configs:
        nodes = config.launcher.nodes
        if launcher_of(config).joins and nodes > 1:
            raise UserError(
                f"launcher.nodes={nodes}, but with launcher={config.launcher.kind} the other nodes "
                "of each point would have to be joined by hand; choose launcher=slurm, or a "
                "hostfile with launcher=deepspeed"
            )


def slots_of(config: SweepConfig, points: Sequence[RunConfig], here: Machine) -> list[Slot]:
    """Return what each point that runs at a time has to itself."""
    first = points[0].launcher
    ranks = None
    if all(each.launcher.knows_ranks for each in points):
        ranks = max(each.launcher.ranks_per_node for each in points)
    if (hostfile := getattr(first, "hostfile", None)) is not None:
        return hosts.slots(config, Path(hostfile), first, ranks)
    on_gpus = any(each.launcher.device != "cpu" for each in points)
    devices = locally.devices_of(here) if on_gpus else []
    return locally.slots(config, devices, sorted(os.sched_getaffinity(0)), ranks)


def machine_of(slot: Slot, here: Machine) -> Machine:
    """Return this machine as a point in a slot sees it. Pure."""
    if slot.words:  # on another
        return here
    return dataclasses.replace(
        here,
        compute_capabilities=here.compute_capabilities[: len(slot.devices)],
        cores=len(slot.cores) or here.cores,
        cuda_visible_devices=",".join(slot.devices),
    )
