"""The most that a rank has alive in a step: its states, what a trace keeps, what engines add to it.

Of the moments of a step the one with most counts: the forward pass with its loss, the backward
pass, its end, when the last gradients are reduced, and the optimizer's step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from shardwright.launchers.plan.states import Held, States, states
from shardwright.launchers.plan.temporaries import temporaries
from shardwright.train.config import FsdpStrategy, RunConfig, ZeroStrategy, rank_layout
from shardwright.train.config.precision import DTYPES
from shardwright.train.plan.facts import ModelFacts, Traced
from shardwright.train.strategy.zero.settings import settings as zero_settings


@dataclass(frozen=True)
class Peak:
    """Bytes of a rank at the moment when most is alive on its device."""

    states: Held
    """What is there between two micro-batches as well."""
    activations: int
    """Kept by the forward pass for the backward pass."""
    working: int
    """What else the two passes need at that moment, of one block."""
    gathered: int
    """Sharded weights that are whole for their use, and the next ones."""
    reducing: int
    """Gradients on their way to their shards."""
    loss: int = 0
    """Of the head and the loss: logits, and their gradients."""
    updating: int = 0
    """Temporaries of the optimizer's step."""

    @property
    def device(self) -> int:
        return self.states.device.total + sum(getattr(self, name) for name in _PASSING)

    @property
    def host(self) -> int:
        return self.states.host.total

    @property
    def disk(self) -> int:
        return self.states.disk.total

    def by_category(self) -> dict[str, int]:
        """Return the device's bytes by what they are for."""
        of_states = {each.name: getattr(self.states.device, each.name) for each in fields(States)}
        return {**of_states, **{name: getattr(self, name) for name in _PASSING}}


_PASSING = ("activations", "working", "loss", "gathered", "reducing", "updating")


def uses_autocast(config: RunConfig) -> bool:
    """Whether weights are fp32 and cast as they are used; else they are in the dtype of compute."""
    is_replicated = config.strategy.kind in ("single", "ddp")
    precision = config.precision
    return is_replicated and precision.compute_dtype != precision.master_dtype


def peak(config: RunConfig, model: ModelFacts, traced: Traced) -> Peak:
    """Return the most that a rank has alive. Pure.

    ``traced`` is of this run's micro-batch, with or without autocast as `uses_autocast` says.
    """
    held = states(config, model)
    passing = _Passing()
    if isinstance(config.strategy, FsdpStrategy):
        passing = _of_fsdp(config, model)
    elif isinstance(config.strategy, ZeroStrategy):
        passing = _of_zero(config, model)
    gathered = passing.gathered
    forward = _divided(traced, traced.forward, of_loss=traced.forward_of_loss)
    backward = _divided(traced, traced.backward, of_loss=traced.backward_of_loss)
    moments = [
        replace(forward, states=held, gathered=gathered),
        replace(backward, states=held, gathered=gathered, reducing=passing.in_backward),
        Peak(held, 0, 0, gathered, passing.at_its_end),
        Peak(held, 0, 0, 0, 0, updating=temporaries(config, model)),
    ]
    return max(moments, key=lambda moment: moment.device)


def _divided(traced: Traced, whole: int, *, of_loss: int) -> Peak:
    """Return what a pass has alive by what it is for.

    ``of_loss`` is what it has at the most while head and loss are at work: where that is all, the
    most is theirs, and else what they have kept.
    """
    blocks = min(traced.kept_by_blocks or traced.kept, whole)
    if 0 < whole <= of_loss:
        return Peak(Held(), blocks, 0, 0, 0, loss=whole - blocks)
    kept = min(traced.kept, whole)
    return Peak(Held(), blocks, whole - max(kept, blocks), 0, 0, loss=max(0, kept - blocks))


@dataclass(frozen=True)
class _Passing:
    """Bytes that an engine adds for a while."""

    gathered: int = 0
    in_backward: int = 0
    """Gradients, while there are activations."""
    at_its_end: int = 0
    """Gradients, when the last of them are reduced and activations are gone."""


def _of_fsdp(config: RunConfig, model: ModelFacts) -> _Passing:
    """Return what is gathered and on its way in the backward pass.

    Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param_group.py: the root stays gathered
    from its first use to the end of the backward pass, a unit for its own passes, with those that
    are gathered ahead of them; without resharding after forward all are there in between. A unit's
    gradients are copied into what is reduced, which stays until those of the next unit are.
    """
    strategy = config.strategy
    assert isinstance(strategy, FsdpStrategy)
    compute = config.precision.computes_in.size_bytes
    root = model.count - sum(model.units)
    largest = sorted(model.units, reverse=True)
    at_once = (
        largest if not strategy.reshard_after_forward else largest[: 1 + strategy.prefetch_units]
    )
    unit = largest[0] if largest else root
    reduced = DTYPES[config.precision.reduce_dtype].size_bytes
    return _Passing(
        gathered=compute * (root + sum(at_once)),
        in_backward=reduced * unit,
        at_its_end=(compute + reduced) * max(root, unit),
    )


def _of_zero(config: RunConfig, model: ModelFacts) -> _Passing:
    """Return what is gathered and on its way in the backward pass.

    Source: deepspeed 0.19.8. Stages 1 and 2 copy gradients into a bucket that is there during the
    backward pass (stage_1_and_2.py, setup_buckets), in the dtype of compute, two with overlap. What
    is reduced in another dtype is cast to it and back. Stage 3 keeps gathered what is used again
    within a distance, and no more than a limit (partitioned_param_coordinator.py,
    release_sub_module and fetch_sub_module); its reduction takes its input once more, and its
    output (comm/coalesced_collectives.py).
    """
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    compute = config.precision.computes_in.size_bytes
    reduced = DTYPES[config.precision.reduce_dtype].size_bytes
    layout = rank_layout(strategy, config.launcher.world_size)
    section = zero_settings(config, layout)["zero_optimization"]
    bucket = section["reduce_bucket_size"]
    at_once = min(bucket, model.count)
    if strategy.stage == 3:
        most = max(strategy.max_live_elements, strategy.max_reuse_distance_elements)
        most += section["stage3_prefetch_bucket_size"]
        small = section["stage3_param_persistence_threshold"]
        large = sum(p.elements for p in model.parameters if p.elements > small)
        output = -(-at_once // layout.shards)
        return _Passing(compute * min(large, most), at_its_end=reduced * (at_once + output))
    cast = (compute + reduced) * at_once if compute != reduced else 0
    if strategy.stage != 2 or not strategy.contiguous_gradients:
        return _Passing(at_its_end=cast)
    buckets = compute * bucket * (1 + strategy.overlaps_communication)
    return _Passing(in_backward=buckets, at_its_end=buckets + cast)
