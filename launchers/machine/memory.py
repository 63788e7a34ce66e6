"""Whether a model can fit at all: bytes that its training holds at the least, against what is here.

Counts what stays from step to step, and only what is certain, so that a refusal is never wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import OPTIMIZERS, RunConfig, TrainerConfig, rank_layout
from shardwright.train.config.precision import DTYPES

GIB = 2**30


@dataclass(frozen=True)
class Parts:
    """Bytes of a rank."""

    weights: float = 0
    master_weights: float = 0
    gradients: float = 0
    moments: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.master_weights + self.gradients + self.moments

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Parts)))

    def times(self, ranks: int) -> Parts:
        return Parts(*(ranks * getattr(self, field.name) for field in fields(Parts)))

    def __str__(self) -> str:
        held = {field.name.replace("_", " "): getattr(self, field.name) for field in fields(Parts)}
        return ", ".join(f"{name} {gib(size)}" for name, size in held.items() if size)


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.1f} GiB"


def needed(config: RunConfig, count: int) -> tuple[Parts, Parts]:
    """Return what a rank holds of ``count`` parameters: on its device, and in host memory. Pure.

    What lies on a disk is not counted.
    """
    precision, strategy = config.precision, config.strategy
    master = DTYPES[precision.master_dtype].size_bytes * count
    compute = precision.computes_in.size_bytes * count
    shards = rank_layout(strategy, config.launcher.world_size).shards
    has_copy = strategy.computes_with_copies and compute != master
    parts = Parts(
        weights=compute if has_copy else master,
        master_weights=master if has_copy else 0,
        gradients=min(compute, master),
        moments=moments_bytes(config.trainer, DTYPES[precision.moments_dtype].size_bytes) * count,
    )
    held: dict[str, dict[str, float]] = {"none": {}, "cpu": {}, "nvme": {}}
    for name, (is_divided, where) in strategy.placement.items():
        held[where][name] = getattr(parts, name) / (shards if is_divided else 1)
    return Parts(**held["none"]), Parts(**held["cpu"])


def moments_bytes(trainer: TrainerConfig, dtype_bytes: int) -> int:
    """Return the bytes of an optimizer's state for each parameter, at the least."""
    facts = OPTIMIZERS[trainer.optimizer]
    return trainer.moments * (facts.moments_bytes or dtype_bytes)


def problems(config: RunConfig, machine: Machine) -> Iterator[str]:
    """Yield a message where the ranks of this machine cannot hold their parts of the model."""
    launcher = config.launcher
    if launcher.is_elsewhere:
        return  # this machine need not be one of theirs
    count = config.model.parameters
    if count is None:
        return
    on_device, on_host = needed(config, count)
    here = launcher.ranks_per_node
    asked = (
        f"strategy.kind={config.strategy.kind} on {launcher.world_size} rank(s) with a "
        f"{config.model.kind} of {count:,} parameters"
    )
    if launcher.device != "cuda":
        on_device, on_host = Parts(), on_device + on_host
    limit = machine.gpu_memory_bytes
    if limit is not None and on_device.total > limit:
        yield (
            f"{asked} takes at least {gib(on_device.total)} of each GPU ({on_device}), and the "
            f"largest here has {gib(limit)}; choose a smaller model, strategy=zero3 or fsdp on "
            "more GPUs, or strategy=zero3_offload or fsdp_offload"
        )
    limit, of_node = machine.memory_bytes, on_host.times(here)
    if limit is not None and of_node.total > limit:
        yield (
            f"{asked} takes at least {gib(of_node.total)} of this machine's memory ({of_node}, "
            f"of {here} rank(s) here), which has {gib(limit)}; choose a smaller model, more nodes "
            "with strategy=zero3 or fsdp, or strategy=zero3_nvme"
        )
