"""What a checkpoint holds under each engine, and how long it takes to write."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.launchers.machine.memory import moments_bytes
from shardwright.launchers.plan.hardware import GIGA, Hardware
from shardwright.train.config import RunConfig, ZeroStrategy, rank_layout
from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.precision import DTYPES
from shardwright.train.plan.facts import ModelFacts

HASHED_BYTES_PER_SECOND = 2 * GIGA
"""Of one rank, serialised, hashed and handed to the system: assumed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run."""

    size_bytes: int
    """Of all ranks."""
    largest_part_bytes: int
    """Of the rank that writes most."""
    seconds: float
    """Until it is on the disks."""
    stalled_seconds: float
    """For which training waits."""


def checkpoint(config: RunConfig, model: ModelFacts, hardware: Hardware) -> Checkpoint:
    """Return what a run's checkpoint takes. Pure.

    DDP and FSDP write master weights and moments once, equally divided among all ranks (torch
    2.13, distributed/checkpoint/default_planner.py, which deduplicates what ranks have alike, but
    not a weight that goes by two names); moments of 8 bits in fp32. Beside a quantised base they
    write what is trained alone.
    DeepSpeed's ranks write what they update; below stage 3 the first one also the weights of
    compute, at stage 0 everything (deepspeed 0.19.8, runtime/engine.py, save_checkpoint). The disks
    of all nodes take their ranks' parts at their speed, and no rank is faster than it hashes; in a
    checkpoint that is written beside training, only the copy to the host's memory stalls it.
    """
    parts = _bytes_of_ranks(config, model)
    ranks = config.launcher.world_size
    averages = OPTIMIZERS[config.trainer.optimizer].averages_itself
    if averages or config.trainer.average_weights is not None:
        own = DTYPES["fp32"].size_bytes * model.count / ranks
        parts = parts[0] + own, parts[1] + own
    largest = parts[0]
    size = largest + (ranks - 1) * parts[1]
    per_node = largest + (min(ranks, hardware.devices) - 1) * parts[1]
    seconds = max(
        largest / HASHED_BYTES_PER_SECOND, per_node / (hardware.nvme_gb_per_second * GIGA)
    )
    stalled = seconds
    if config.checkpoint.asynchronous:
        stalled = largest / (hardware.host_link_gb_per_second * GIGA)
    return Checkpoint(round(size), round(largest), seconds, stalled)


def _bytes_of_ranks(config: RunConfig, model: ModelFacts) -> tuple[float, float]:
    """Return what the first rank writes, and what each of the others does."""
    precision, strategy, ranks = config.precision, config.strategy, config.launcher.world_size
    master = DTYPES[precision.master_dtype].size_bytes
    moments = moments_bytes(config.trainer, DTYPES[precision.moments_dtype].size_bytes)
    if OPTIMIZERS[config.trainer.optimizer].quantises:
        moments = 2 * DTYPES["fp32"].size_bytes
    trained = model.trained.count
    states = (master + moments) * trained
    frozen = model.count - trained
    if not isinstance(strategy, ZeroStrategy):
        kept = 0 if model.is_packed else frozen + model.repeated_elements
        written = states + master * kept
        return written / ranks, written / ranks
    frozen = 0 if model.is_packed else frozen
    compute = precision.computes_in.size_bytes * (trained + frozen)
    if strategy.stage == 0:
        is_same = precision.computes_in.size_bytes == master
        return states + (master * frozen if is_same else compute), 0
    shards = rank_layout(strategy, ranks).shards
    of_first = compute if strategy.stage < 3 else 0
    of_each = states / shards
    if strategy.stage == 3:
        of_each += precision.computes_in.size_bytes * frozen / shards
    elif frozen and config.launcher.device == "cuda":
        # Once more, as what is copied to the host by itself shares no memory with the rest.
        of_first += precision.computes_in.size_bytes * frozen
    return of_first + of_each, of_each
