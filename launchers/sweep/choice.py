"""Where the points of a sweep run: here, on the hosts of a hostfile, as jobs, or below Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardwright.launchers.machine.facts import Machine, not_there
from shardwright.launchers.registry import launcher_of
from shardwright.launchers.sweep import hosts, locally, ray_tasks
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.directory import Sweep
from shardwright.launchers.sweep.jobs import Jobs
from shardwright.launchers.sweep.locally import Slot
from shardwright.launchers.sweep.places import Display, Place, Task
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from shardwright.train.process.cores import usable_cores


@dataclass(frozen=True)
class Where:
    """Where points run, before anything is started there."""

    described: str
    words: tuple[str, ...]
    """Settings that it adds to each start."""
    machine: Machine
    """This machine as a point sees it."""
    opened: Callable[[Display], Place]
    shown: Callable[[Sequence[Task]], str] | None = None
    """What would be handed over, as `--dry-run` prints it; None where each point is a command."""


def where(sweep: Sweep, points: Sequence[RunConfig], here: Machine) -> Where:
    """Return where points run. Raises UserError where there is no room, or Ray is not installed."""
    config = sweep.definition
    if config.backend == "ray":
        ray_tasks.check_installed()
        on_gpus = any(each.launcher.device != "cpu" for each in points) and here.torch_has_cuda
        opened = partial(ray_tasks.opened, config, ranks_of(points), on_gpus, here.cores)
        return Where("as tasks of Ray", (), here, lambda display: opened())
    if launcher_of(points[0]).queue is not None:
        if config.devices_per_point != "auto":
            raise UserError(
                f"sweep.devices_per_point={config.devices_per_point}, but with "
                f"launcher={points[0].launcher.kind} a point has what its job asks for; set "
                "launcher.gpus_per_node or launcher.nproc_per_node, or leave it out"
            )
        is_open = config.search.kind != "none" or config.backend == "wandb"
        waits = is_open or getattr(points[0].launcher, "wait", False)
        of_queue = partial(Jobs, sweep.directory, config, Path.cwd(), waits=waits)
        shown = of_queue(say=print)
        return Where(
            shown.described(), (), here, lambda display: of_queue(say=display.say), shown.shown
        )
    slots = slots_of(config, points, here)
    place = locally.Processes(slots, Path.cwd())
    return Where(
        place.described(), slots[0].words, machine_of(slots[0], here), lambda display: place
    )


def check_launchers(configs: Sequence[RunConfig], backend: str = "here") -> None:
    """Raise UserError where points cannot be started by one place. Configs as they are given."""
    kinds = sorted({config.launcher.kind for config in configs})
    queues = {launcher_of(config).queue is not None for config in configs}
    if backend == "ray" and (True in queues or any(_hostfile(each) for each in configs)):
        raise UserError(
            f"sweep.backend=ray with launcher={','.join(kinds)}: Ray says where a point runs, and "
            "this launcher does as well; choose launcher=torchrun or local, or leave "
            "sweep.backend out"
        )
    if backend == "ray" and (
        ids := next(filter(None, (c.launcher.gpu_ids for c in configs)), None)
    ):
        raise UserError(
            f"sweep.backend=ray with launcher.gpu_ids={list(ids)}: Ray says which GPUs a point "
            "has; leave it out, and start Ray with those that it may give"
        )
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
    first, ranks = points[0].launcher, ranks_of(points)
    if (hostfile := _hostfile(points[0])) is not None:
        return hosts.slots(config, Path(hostfile), first, ranks)
    on_gpus = any(each.launcher.device != "cpu" for each in points)
    devices = locally.devices_of(here) if on_gpus else []
    if devices and (chosen := gpus_of(points)) is not None:
        if problems := not_there(chosen, here):
            raise UserError(problems[0])
        devices = [devices[here.numbers.index(number)] for number in chosen]
    return locally.slots(config, devices, sorted(usable_cores()), ranks)


def ranks_of(points: Sequence[RunConfig]) -> int | None:
    """Return the most ranks that a point has; None where that follows from where it runs. Pure."""
    if not all(each.launcher.knows_ranks for each in points):
        return None
    return max(each.launcher.ranks_per_node for each in points)


def gpus_of(points: Sequence[RunConfig]) -> tuple[int, ...] | None:
    """Return the GPUs that all points choose; None where none chooses any. Pure.

    Raises UserError where they choose several.
    """
    chosen = {each.launcher.gpu_ids for each in points}
    if len(chosen) > 1:
        first, second = sorted(map(_shown, chosen))[:2]
        raise UserError(
            f"launcher.gpu_ids is {first} of one point and {second} of another, but a sweep gives "
            "its points what is free; leave it out, and set CUDA_VISIBLE_DEVICES to those GPUs "
            "that the sweep may take"
        )
    return next(iter(chosen))


def _shown(gpu_ids: tuple[int, ...] | None) -> str:
    return "null" if gpu_ids is None else str(list(gpu_ids))


def _hostfile(config: RunConfig) -> str | None:
    return getattr(config.launcher, "hostfile", None)


def machine_of(slot: Slot, here: Machine) -> Machine:
    """Return this machine as a point in a slot sees it. Pure."""
    if slot.words:  # on another
        return here
    devices = locally.devices_of(here)
    return dataclasses.replace(
        here.with_gpus([devices.index(device) for device in slot.devices]),
        cores=len(slot.cores) or here.cores,
        cuda_visible_devices=",".join(slot.devices),
    )
