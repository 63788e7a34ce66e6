"""The plan of a run that exists: what its own config takes, beside what it has been measured to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shardwright.launchers.plan import child, hardware
from shardwright.launchers.plan.candidates import as_traced
from shardwright.launchers.plan.hardware import Hardware
from shardwright.launchers.plan.peak import Peak, peak, uses_autocast
from shardwright.launchers.plan.speed import Pace, lacking, pace
from shardwright.train import config as run_config
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from shardwright.train.run_directory import history, owner, plan
from shardwright.train.run_directory.plan import Planned, Start, settings_of


def starts(run_dir: Path) -> tuple[list[Start], str | None]:
    """Return what was planned and measured of a run, the newest last, and why a plan is lacking.

    A plan that its newest start lacks is made now, and written down unless the run lives: then its
    first rank does that. Raises UserError where there is no config to be read.
    """
    config = run_config.load(run_dir)
    settings = settings_of(config)
    found = plan.read(run_dir)
    if not found or found[-1].settings != settings:
        found.append(Start(settings))
    if found[-1].planned is not None:
        return found, None
    try:
        planned = of_config(config, device_of(run_dir, config))
    except UserError as error:
        return found, str(error)
    found[-1] = replace(found[-1], planned=planned)
    _, is_alive = owner.look(run_dir)
    if not is_alive:
        try:
            plan.note(run_dir, settings, planned=planned)
        except OSError as error:
            return found, f"the plan was made and cannot be kept: {error}"
    return found, None


def of_config(config: RunConfig, device: Hardware | None) -> Planned:
    """Return the plan of a resolved config; without a ``device`` that of its memory alone.

    Raises UserError where the model cannot be built here.
    """
    model, (traced,) = child.looked_at(as_traced(config), [uses_autocast(config)])
    is_timed = device is not None and lacking(config, device) is None
    found = pace(config, model, traced, device) if device is not None and is_timed else None
    return planned(config, peak(config, model, traced), found, device)


def planned(
    config: RunConfig, found: Peak, found_pace: Pace | None = None, device: Hardware | None = None
) -> Planned:
    """Return what plan.json holds of a plan. Pure."""
    held = (found.states.device, found.states.host, found.states.disk)
    # DDP's buckets are gradients that Python does not see; those of ZeRO are told as such.
    buckets = sum(each.buckets for each in held) if config.strategy.kind != "ddp" else 0
    return Planned(
        device_bytes=found.device,
        host_bytes=found.host,
        disk_bytes=found.disk,
        by_category=found.by_category(),
        parameters_bytes=sum(each.weights for each in held),
        gradients_bytes=sum(each.gradients for each in held) + buckets,
        optimizer_bytes=sum(each.optimizer for each in held),
        step_seconds=None if found_pace is None else found_pace.step_seconds,
        tokens_per_second=None if found_pace is None else found_pace.tokens_per_second,
        hardware=None if found_pace is None or device is None else _name(device),
    )


def device_of(run_dir: Path, config: RunConfig) -> Hardware | None:
    """Return the hardware that a run's newest start has noted; None where none is known of it.

    Of CPUs none is: their figures in conf/hardware/ are those of a server that is supposed.
    """
    if config.launcher.device != "cuda":
        return None
    for path in reversed(history.provenances(run_dir)):
        try:
            names: Sequence[str] = json.loads(path.read_text(encoding="utf-8"))["hardware"]["gpus"]
            found = hardware.of_device(names[0]) if names else None
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if found is not None:
            devices = config.launcher.ranks_per_node
            nodes = config.launcher.world_size // devices
            return found.model_copy(update={"devices": devices, "nodes": nodes})
    return None


def _name(device: Hardware) -> str:
    name = device.cuda_names[0] if device.cuda_names else device.device
    return f"{device.nodes} x {device.devices} x {name}"
