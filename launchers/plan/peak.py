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

STAGE_0_BUCKET_ELEMENTS = 500_000_000
"""deepspeed 0.19.8, engine.py, MEMORY_OPT_ALLREDUCE_SIZE."""


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
    match config.strategy:
        case FsdpStrategy():
            moments = _of_fsdp(config, model, traced)
        case ZeroStrategy():
            moments = _of_zero(config, model, traced)
        case _:
            moments = [_in_forward(traced), _in_backward(traced)]
    moments.append(replace(_NOTHING, updating=temporaries(config, model)))
    return replace(max(moments, key=lambda moment: moment.device), states=held)


_NOTHING = Peak(Held(), 0, 0, 0, 0)


def _in_forward(traced: Traced, gathered: int = 0) -> Peak:
    found = _divided(traced, traced.forward, of_loss=traced.forward_of_loss)
    return replace(found, gathered=gathered)


def _in_backward(traced: Traced, gathered: int = 0, reducing: int = 0, gone: int = 0) -> Peak:
    """``gone`` is what blocks have kept and is no longer there."""
    found = _divided(traced, traced.backward, of_loss=traced.backward_of_loss)
    kept = max(found.activations - gone, 0)
    return replace(found, activations=kept, gathered=gathered, reducing=reducing)


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


def _of_fsdp(config: RunConfig, model: ModelFacts, traced: Traced) -> list[Peak]:
    """Return the moments in which FSDP has most.

    Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param_group.py. The root stays gathered
    from its first use to the end of the backward pass, a unit for its own passes. In the forward
    pass the flat result of a gathering stays until the next unit's is copied out of its own
    (wait_for_unshard): at the loss that of the last unit. A head that is a unit stays itself, and
    without resharding after forward all do. In the backward pass a unit and those gathered ahead of
    it are there, and what was reduced of the unit before until its own gradients are to be
    (post_backward, reduce_scatter_states): gradients that are held whole make room for that. What
    the root has of gradients, the head's where it is tied, waits for the end.
    """
    strategy = config.strategy
    assert isinstance(strategy, FsdpStrategy)
    compute = config.precision.computes_in.size_bytes
    reduced = DTYPES[config.precision.reduce_dtype].size_bytes
    shards = rank_layout(strategy, config.launcher.world_size).shards
    of_units, root = model.gathered_bytes(compute)
    units = sorted(of_units, reverse=True)
    trained = model.trained
    # Only what is trained has gradients.
    with_gradients = max(trained.units, default=trained.count)
    root_with_gradients = trained.count - sum(trained.units)
    last = of_units[-1] if units else root
    has_head = bool(units) and not getattr(config.model, "tie_word_embeddings", True)
    largest = max(parameter.elements for parameter in trained.parameters)
    of_head = 0 if has_head else compute * min(largest, root_with_gradients)
    between = sum(units) // strategy.reshard_ranks if strategy.reshard_ranks else 0
    at_loss, at_once = (last if has_head else 0), sum(units[: 1 + strategy.prefetch_units])
    if not strategy.reshard_after_forward:
        at_loss = at_once = sum(units)
    gathered = root + between + at_once
    # Blocks are alike: what one has kept is gone when the next one's backward pass begins. Of what
    # is computed again that is hardly more than its own input.
    kept = traced.kept_by_blocks or max(min(traced.kept, traced.backward) - of_head, 0)
    gone = kept // max(len(units), 1)
    if config.trainer.checkpoint_activations_every_blocks is not None:
        gone = 0
    before = reduced * with_gradients if strategy.reduce_each_micro_batch else 0
    of_unit = compute * with_gradients + before + reduced * with_gradients // shards
    of_root = (compute + reduced + reduced // shards) * root_with_gradients
    of_loss = traced.forward_of_loss or traced.forward
    loss = _divided(traced, of_loss, of_loss=traced.forward_of_loss)
    return [
        replace(loss, gathered=root + between + at_loss + last),
        *([_in_forward(traced, gathered)] if traced.forward > of_loss else []),
        _in_backward(traced, gathered, of_head),
        _in_backward(traced, gathered, of_head + before, gone),
        replace(_NOTHING, activations=kept - gone, gathered=gathered, reducing=of_head + of_unit),
        replace(_NOTHING, reducing=max(of_root, 2 * root + before)),
    ]


def _of_zero(config: RunConfig, model: ModelFacts, traced: Traced) -> list[Peak]:
    """Return the moments in which DeepSpeed has most.

    Source: deepspeed 0.19.8. Stages 1 and 2 copy gradients into a bucket that is there during the
    backward pass (stage_1_and_2.py, setup_buckets), in the dtype of compute, two with overlap. What
    is reduced in another dtype is cast to it and back. Stage 0 lays all gradients end to end once
    more, 500M elements at a time whatever the bucket (engine.py, allreduce_bucket). Stage 3 keeps
    gathered what is used again within a distance, and no more than a limit
    (partitioned_param_coordinator.py, release_sub_module and fetch_sub_module); its reduction takes
    its input once more, and its output (comm/coalesced_collectives.py).
    """
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    compute = config.precision.computes_in.size_bytes
    reduced = DTYPES[config.precision.reduce_dtype].size_bytes
    layout = rank_layout(strategy, config.launcher.world_size)
    section = zero_settings(config, layout)["zero_optimization"]
    bucket = section["reduce_bucket_size"]
    at_once = min(bucket, model.trained.count)
    if strategy.stage == 3:
        most = max(strategy.max_live_elements, strategy.max_reuse_distance_elements)
        most += section["stage3_prefetch_bucket_size"]
        small = section["stage3_param_persistence_threshold"]
        large = sum(p.elements for p in model.parameters if p.elements > small)
        output = -(-at_once // layout.shards)
        gathered = compute * min(large, most)
        return [
            _in_forward(traced, gathered),
            _in_backward(traced, gathered),
            replace(_NOTHING, gathered=gathered, reducing=reduced * (at_once + output)),
        ]
    if strategy.stage == 0:
        at_once = min(STAGE_0_BUCKET_ELEMENTS, model.trained.count)
    is_cast = compute != reduced
    copied = compute * at_once if is_cast or strategy.stage == 0 else 0
    cast = reduced * at_once if is_cast else 0
    buckets = 0
    if strategy.stage == 2 and strategy.contiguous_gradients:
        buckets = compute * bucket * (1 + strategy.overlaps_communication)
    return [
        _in_forward(traced),
        _in_backward(traced, reducing=buckets),
        replace(_NOTHING, reducing=buckets + copied + cast),
    ]
