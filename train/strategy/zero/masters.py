"""ZeRO's master weights: where they lie, and what DeepSpeed gets wrong about them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from shardwright.train.config import RunConfig
    from shardwright.train.model.weights import Wanted
    from shardwright.train.strategy.training import Training

logger = logging.getLogger(__name__)

Piece = tuple[str, int, int, int]
"""A parameter's name, its first element in a flat partition, how many, and their place there."""


def complete(trainer: Training) -> None:
    """Mend what deepspeed 0.19 gets wrong.

    With round_robin_gradients it links parameters to the masters of others. In bf16 and fp16 it
    clones the fp32 masters from the rounded parameters; here both get their values. At stage 0 it
    also makes room for the moments by a step with zero gradients, which decays the masters and
    counts as Adam's first; in fp32 it drops the gradient norm there, and steps whatever it is:
    everywhere else it skips a step whose gradient norm is not finite. Of gradients on NVMe it reads
    most not at all.
    """
    from torch.nn.utils import clip_grad_norm_, get_total_norm

    from shardwright.train.strategy.zero import swapped

    engine = trainer.model_wrapped
    _link_masters(engine.optimizer)
    swapped.align_gradients(engine.optimizer)
    if getattr(engine.optimizer, "swap_optimizer", False) and not swapped.elements(
        engine.optimizer
    ):
        logger.warning(
            "strategy.offload_optimizer=nvme stores nothing on the disk: what is smaller than a "
            "MiB, or strategy.aio.block_size_bytes, stays in memory, and all parts of this "
            "model are"
        )
    has_initial_values = bool(trainer.initial_values)
    if has_initial_values and has_own_masters(trainer.config):
        _start_from_fp32(trainer)
    if engine.zero_optimization_stage() > 0:
        return
    if replicated_masters(engine):
        if has_initial_values:
            engine.optimizer.optimizer.state.clear()
        return

    trainer.gate.guard(engine.optimizer)

    def clip() -> None:
        limit = engine.gradient_clipping()
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), limit)
        trainer.gate.judge(engine._global_grad_norm)

    step = engine.optimizer.step

    def measured(*arguments: Any, **options: Any) -> Any:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        engine._global_grad_norm = get_total_norm(gradients)
        trainer.gate.judge(engine._global_grad_norm)
        return step(*arguments, **options)

    if engine.gradient_clipping() > 0:
        engine.clip_fp32_gradients = clip
    else:
        engine.optimizer.step = measured


def judge_before_updates(trainer: Training, device: torch.device | str) -> None:
    """Have the gate judge each step before DeepSpeed's own optimizer updates on ``device``.

    deepspeed 0.19 takes the whole step inside of the last backward pass, so that the loop hears of
    its gradient norm too late. In fp32 at stage 0 `complete` has seen to that.
    """
    engine = trainer.model_wrapped
    if engine.zero_optimization_stage() == 0 and not replicated_masters(engine):
        return
    optimizer = trainer.innermost_optimizer()
    # At stage 3 it has parameters only while it updates a group of them.
    trainer.gate.guard(optimizer, device)
    step = optimizer.step

    def judged(*arguments: Any, **options: Any) -> Any:
        trainer.gate.judge(engine.optimizer._global_grad_norm)
        return step(*arguments, **options)

    optimizer.step = judged  # type: ignore[method-assign]


def _link_masters(zero: Any) -> None:
    """Link each parameter to its own master weight, for DeepSpeed's safe_get and safe_set.

    They lie in the order of round_robin_bit16_groups, but deepspeed 0.19 links them in that of
    bit16_groups (runtime/zero/stage_1_and_2.py, _link_all_hp_params).
    """
    if hasattr(zero, "round_robin_bit16_groups"):
        plain, zero.bit16_groups = zero.bit16_groups, zero.round_robin_bit16_groups
        zero._link_all_hp_params()
        zero.bit16_groups = plain


def has_own_masters(config: RunConfig) -> bool:
    """Return whether each parameter is a rounded copy of an fp32 master weight."""
    precision = config.precision
    return precision.compute_dtype != "fp32" and precision.master_dtype == "fp32"


def to_hold(name: str, parameter: Any) -> Wanted:
    """Return what this rank is to hold of a parameter of stage 3: equal parts, the last padded."""
    from shardwright.train.model.weights import Wanted

    share = -(-parameter.ds_numel // parameter.ds_zero_partition_world_size)
    start = min(parameter.ds_zero_partition_rank * share, parameter.ds_numel)
    return Wanted(name, parameter.ds_numel, start, min(share, parameter.ds_numel - start))


def _start_from_fp32(trainer: Training) -> None:
    """Give the master weights their values, and the parameters the same rounded.

    One parameter at a time, on every rank; each value is read or drawn once.
    """
    from shardwright.train.model.first_values import dealt_in_turn, whole_in_turn
    from shardwright.train.strategy.zero import swapped

    engine, values = trainer.model_wrapped, trainer.initial_values
    zero = engine.optimizer
    parameters: dict[str, Any] = dict(engine.module.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    if engine.zero_optimization_stage() == 3:
        flats = list(flat_partitions(engine, names))
        wanted = [to_hold(name, parameters[name]) for _, pieces in flats for name, *_ in pieces]
        parts = dealt_in_turn(wanted, values, trainer.layout.shards)
        for index, (flat, pieces) in enumerate(flats):
            with swapped.in_memory(zero, index):
                for (*_, place), part in zip(pieces, parts, strict=False):
                    flat.data[place : place + part.numel()].copy_(part)
                # What DeepSpeed does after each step.
                zero._reassign_or_swap_out_partitioned_parameters(index)
        return

    # Where the elements of each parameter from a certain one on are.
    found: dict[str, list[tuple[torch.Tensor, int]]] = {name: [] for name in parameters}
    if replicated := replicated_masters(engine):
        for parameter, master in replicated.items():
            found[names[parameter]].append((master.data.view(-1), 0))
    else:
        for flat, pieces in flat_partitions(engine, names):
            for name, start, length, place in pieces:
                found[name].append((flat.data[place : place + length], start))
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    elements = {name: parameter.numel() for name, parameter in trained.items()}
    wholes = whole_in_turn(elements, values, trainer.config.launcher.device)
    for (name, parameter), whole in zip(trained.items(), wholes, strict=True):
        parameter.data.copy_(whole.view(parameter.shape))
        for master, start in found[name]:
            master.copy_(whole[start : start + master.numel()])


def replicated_masters(engine: Any) -> dict[Any, torch.Tensor]:
    """Return the fp32 master of each bf16 or fp16 parameter at stage 0; none at other stages."""
    if engine.zero_optimization_stage() > 0 or not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {p: m for low, high in groups for p, m in zip(low, high, strict=True)}


def flat_partitions(
    engine: Any, names: dict[Any, str]
) -> Iterator[tuple[torch.Tensor, list[Piece]]]:
    """Yield this rank's flat fp32 partitions and what lies where in them."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            place, pieces = 0, []
            for parameter in group:
                _, _, start, length = to_hold(names[parameter], parameter)
                pieces.append((names[parameter], start, length, place))
                place += parameter.ds_tensor.ds_numel
            yield flat, pieces
        return
    # Stage 1 in bf16 is a class of its own, BF16_Optimizer.
    is_bf16 = hasattr(zero, "fp32_groups_flat_partition")
    flats = zero.fp32_groups_flat_partition if is_bf16 else zero.single_partition_of_fp32_groups
    groups = zero.bf16_groups if is_bf16 else zero.round_robin_bit16_groups
    for flat, group in zip(flats, groups, strict=True):
        begin = engine.global_rank * flat.numel()
        offset, pieces = 0, []
        for parameter in group:
            first = max(begin, offset)
            last = min(begin + flat.numel(), offset + parameter.numel())
            if first < last:
                pieces.append((names[parameter], first - offset, last - first, first - begin))
            offset += parameter.numel()
        yield flat, pieces


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ascending ranges with those joined that follow on one another, empty ones left out."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif stop > start:
            joined.append((start, stop))
    return joined


def master_partitions(zero: Any) -> list[torch.Tensor]:
    """Return this rank's flat master weights, one tensor for each group, at any stage but 0."""
    # Stage 1 with bf16 and fp32 accumulation is a class of its own, BF16_Optimizer.
    names = (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    )
    partitions = next(getattr(zero, name) for name in names if hasattr(zero, name))
    return [partition for partition in partitions if partition is not None]
