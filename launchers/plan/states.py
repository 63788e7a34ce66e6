"""What a rank holds of a model between two micro-batches, by category and place: arithmetic.

Each formula is held by a test against the live engines. What waits on a disk is told apart from
what lies in memory; of several ranks it is the one that holds most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from shardwright.launchers.machine.memory import moments_bytes
from shardwright.train.config import (
    FsdpStrategy,
    RunConfig,
    ZeroStrategy,
    accumulation_steps,
    rank_layout,
)
from shardwright.train.config.precision import DTYPES
from shardwright.train.plan.facts import ModelFacts, Parameter
from shardwright.train.strategy.zero.settings import settings as zero_settings


@dataclass(frozen=True)
class States:
    """Bytes of a rank."""

    weights: int = 0
    """In the dtype of compute, or the masters where there is no copy beside them."""
    kept_whole: int = 0
    """Of sharded weights those that every rank keeps gathered."""
    gradients: int = 0
    """Accumulated from one micro-batch to the next."""
    buckets: int = 0
    """Buffers that are there as long as the engine is."""
    master_weights: int = 0
    """Where they lie beside the weights."""
    moments: int = 0
    """The optimizer's."""
    average: int = 0
    """That of the weights."""

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))

    @property
    def optimizer(self) -> int:
        return self.master_weights + self.moments


@dataclass(frozen=True)
class Held:
    """States of a rank by where they lie."""

    device: States = field(default_factory=States)
    host: States = field(default_factory=States)
    disk: States = field(default_factory=States)


def states(config: RunConfig, model: ModelFacts) -> Held:
    """Return what a rank holds under a run's strategy. Pure.

    The launcher's ranks and the micro-batch have to be resolved.
    """
    match config.strategy:
        case ZeroStrategy():
            held = _zero_0(config, model) if config.strategy.stage == 0 else _zero(config, model)
        case FsdpStrategy():
            held = _fsdp(config, model)
        case _:
            held = _replicated(config, model)
    return _with_average(held, config, model)


def _with_average(held: Held, config: RunConfig, model: ModelFacts) -> Held:
    """Add the average of the weights: in fp32, an equal part of a rank, where the masters are.

    Source: train/strategy/state/average.py.
    """
    if config.trainer.average_weights is None:
        return held
    part = -(-model.count // config.launcher.world_size) * DTYPES["fp32"].size_bytes
    strategy = config.strategy
    is_on_host = getattr(strategy, "offload_optimizer", "none") != "none" or getattr(
        strategy, "offload", False
    )
    if is_on_host:
        return replace(held, host=_sum(held.host, States(average=part)))
    return replace(held, device=_sum(held.device, States(average=part)))


def _bytes(config: RunConfig) -> tuple[int, int, int, int]:
    """Return the bytes of an element: compute, master, reduced gradient, moments together."""
    precision = config.precision
    return (
        precision.computes_in.size_bytes,
        DTYPES[precision.master_dtype].size_bytes,
        DTYPES[precision.reduce_dtype].size_bytes,
        moments_bytes(config.trainer, DTYPES[precision.moments_dtype].size_bytes),
    )


# --- every rank holds everything ------------------------------------------------------------------


def _replicated(config: RunConfig, model: ModelFacts) -> Held:
    """One rank, or DDP: autocast over master weights, gradients in their dtype.

    Source: torch 2.13, DistributedDataParallel: with gradient_as_bucket_view the gradients are the
    buckets. Those of micro-batches that are not reduced lie beside them: the Trainer sets gradients
    to None after each step, and only a reduction makes them views again. Quantised layers are
    packed (train/model/quantised.py).
    """
    _, master, _, moments = _bytes(config)
    count = model.trained.count
    weights = model.weights_bytes(master)
    held = States(weights=weights, gradients=master * count, moments=moments * count)
    layout = rank_layout(config.strategy, config.launcher.world_size)
    if config.strategy.kind == "ddp" and accumulation_steps(config.trainer, layout) > 1:
        held = replace(held, buckets=master * count)
    return Held(held)


# --- DeepSpeed ------------------------------------------------------------------------------------


def _zero_0(config: RunConfig, model: ModelFacts) -> Held:
    """Stage 0: DeepSpeed's wrappers for mixed precision, which shard nothing.

    Source: deepspeed 0.19.8, runtime/bf16_optimizer.py and fp16/fused_optimizer.py: masters beside
    the weights; gradients are accumulated in the dtype of compute.
    """
    compute, master, _, moments = _bytes(config)
    count = model.trained.count
    if compute == master:
        return _replicated(config, model)
    return Held(
        States(
            weights=model.weights_bytes(compute),
            gradients=compute * count,
            master_weights=master * count,
            moments=moments * count,
        )
    )


def _zero(config: RunConfig, model: ModelFacts) -> Held:
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    layout = rank_layout(strategy, config.launcher.world_size)
    section = zero_settings(config, layout)["zero_optimization"]
    find = _stage_3 if strategy.stage == 3 else _stages_1_and_2
    return find(config, model, layout.shards, section)


def _stages_1_and_2(
    config: RunConfig, model: ModelFacts, ranks: int, section: dict[str, int]
) -> Held:
    """Weights whole; masters, moments and at stage 2 gradients by equal parts of flat groups.

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py. Masters are a copy in fp32 too (line
    560). At stage 1 every rank accumulates every gradient, beside those that backward leaves: where
    dtypes are the same, or they go to the host, they are views of the bucket, which stays for them
    (with overlap there are two). At stage 2 a gradient that two ranks
    share is kept whole by both where no cast makes a copy of its part. Offloaded, the host keeps
    the accumulated part, once more for the update, and a copy of the updated weights (571); host
    and device have a buffer of the largest parameter each (653 to 661).
    """
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    compute, master, reduced, moments = _bytes(config)
    trained = model.trained
    groups = _groups(trained)
    part = sum(-(-_count(group) // (2 * ranks)) * 2 for group in groups)
    largest = max(parameter.elements for parameter in trained.parameters)
    is_same = config.precision.compute_dtype == config.precision.reduce_dtype
    weights = States(weights=model.weights_bytes(compute))
    optimizer = States(master_weights=master * part, moments=moments * part)
    is_offloaded = strategy.offload_optimizer != "none"
    bucket = reduced * section["reduce_bucket_size"] * (1 + strategy.overlaps_communication)
    if strategy.stage == 2:
        gradients = reduced * (_touched(groups, ranks) if is_same else part)
        bucket = 0
    elif is_offloaded or is_same:
        gradients = reduced * trained.count
    else:
        gradients = (reduced + compute) * trained.count
        bucket = 0
    if not is_offloaded:
        return Held(_sum(weights, optimizer, States(gradients=gradients, buckets=bucket)))
    of_host = States(
        gradients=gradients + master * part, buckets=compute * part + compute * largest
    )
    of_device = States(buckets=compute * largest + bucket)
    return Held(_sum(weights, of_device), _sum(optimizer, of_host))


def _stage_3(config: RunConfig, model: ModelFacts, ranks: int, section: dict[str, int]) -> Held:
    """Everything by equal parts of each parameter, rounded up; small ones stay gathered.

    Source: deepspeed 0.19.8, runtime/zero/stage3.py. The gradients' partitions are one flat buffer
    in the dtype of accumulation (791), a bucket is held for good (782); with an offloaded optimizer
    the host has the gradients once more in the masters' dtype (1338).
    """
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    compute, master, reduced, moments = _bytes(config)
    of_weights, part = (
        sum(-(-parameter.elements // ranks) for parameter in each.parameters)
        for each in (model, model.trained)
    )
    threshold = section["stage3_param_persistence_threshold"]
    whole = sum(p.elements for p in model.parameters if p.elements <= threshold)
    buckets = reduced * section["reduce_bucket_size"] if strategy.contiguous_gradients else 0
    weights = States(weights=compute * of_weights)
    gradients = States(gradients=reduced * part)
    optimizer = States(master_weights=master * part, moments=moments * part)
    on_device = States(kept_whole=compute * whole, buckets=buckets)
    on_host, on_disk = States(), States()
    if strategy.offload_optimizer == "none":
        on_device = _sum(on_device, gradients, optimizer)
    else:
        gradients = replace(gradients, gradients=(reduced + master) * part)
        if strategy.offload_optimizer == "nvme":
            # swap_tensor/optimizer_utils.py: buffers of the largest sub-group each.
            largest = min(part, strategy.sub_group_elements)
            swapped = States(buckets=strategy.nvme_optimizer_buffer_count * master * largest)
            on_host, on_disk = _sum(on_host, gradients, swapped), optimizer
        else:
            on_host = _sum(on_host, gradients, optimizer)
    match strategy.offload_parameters:
        case "none":
            on_device = _sum(on_device, weights)
        case "cpu":
            on_host = _sum(on_host, weights)
        case "nvme":
            buffers = strategy.nvme_buffer_count * strategy.nvme_buffer_elements
            on_host = _sum(on_host, States(buckets=compute * buffers))
            on_disk = _sum(on_disk, weights)
    return Held(on_device, on_host, on_disk)


def _groups(model: ModelFacts) -> list[list[Parameter]]:
    """Return the optimizer's groups: what decays, and what does not."""
    found = [[p for p in model.parameters if p.decays is decays] for decays in (True, False)]
    return [group for group in found if group]


def _count(parameters: Sequence[Parameter]) -> int:
    return sum(parameter.elements for parameter in parameters)


def _touched(groups: Sequence[Sequence[Parameter]], ranks: int) -> int:
    """Return the elements of all parameters of which the worst rank has a part. Pure."""
    return max(sum(_of_rank(group, ranks, rank) for group in groups) for rank in range(ranks))


def _of_rank(group: Sequence[Parameter], ranks: int, rank: int) -> int:
    part = -(-_count(group) // (2 * ranks)) * 2
    begin, end = rank * part, (rank + 1) * part
    return sum(size for start, size in _places(group) if start < end and start + size > begin)


def _places(group: Sequence[Parameter]) -> Iterator[tuple[int, int]]:
    at = 0
    for parameter in group:
        yield at, parameter.elements
        at += parameter.elements


# --- FSDP -----------------------------------------------------------------------------------------


def _fsdp(config: RunConfig, model: ModelFacts) -> Held:
    """Everything by equal runs of rows of each parameter, rounded up.

    Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param.py: what a rank has is padded
    to the first rank's share; gradients that are not reduced at each micro-batch are accumulated
    whole, in the dtype in which they are reduced.
    """
    strategy = config.strategy
    assert isinstance(strategy, FsdpStrategy)
    _, master, reduced, moments = _bytes(config)
    ranks = rank_layout(strategy, config.launcher.world_size).shards
    of_weights = model.divided_bytes(master, ranks=ranks)
    part = model.trained.divided_bytes(1, ranks=ranks)
    whole = reduced * model.trained.count
    gradients = master * part if strategy.reduce_each_micro_batch else whole
    held = States(weights=of_weights, gradients=gradients, moments=moments * part)
    return Held(host=held) if strategy.offload else Held(device=held)


def _sum(*parts: States) -> States:
    names = [each.name for each in fields(States)]
    return States(**{name: sum(getattr(part, name) for part in parts) for name in names})
