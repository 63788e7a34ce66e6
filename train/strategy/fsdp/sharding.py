"""A model's parameters on the ranks that share them: `fully_shard`, and who holds which part."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from shardwright.train.config import RankLayout, RunConfig
from shardwright.train.strategy.dtypes import TORCH_DTYPES
from shardwright.train.strategy.fsdp.settings import settings
from shardwright.train.strategy.fsdp.units import Unit, units

if TYPE_CHECKING:
    import torch
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

    from shardwright.train.checkpoint.format.lazy import LazyTensor
    from shardwright.train.model.quantised import DividingQuantiser
    from shardwright.train.model.weights import InitialValues


def sharded(
    model: PreTrainedModel,
    values: InitialValues,
    config: RunConfig,
    layout: RankLayout,
    dtype: str,
) -> PreTrainedModel:
    """Shard the parameters in place, each unit as one, then write this rank's part of each value.

    They are held in ``dtype``. Units within come first: a parent takes whatever its children have
    not taken. Raises UserError where the wrap policy finds no unit but the whole model.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    from shardwright.train.model import quantised

    wanted = settings(config, layout)
    mixed, offload = wanted["mixed_precision"], wanted["offload"]
    held_in = getattr(torch, TORCH_DTYPES[dtype])
    quantiser = quantised.dividing(model, config)
    for _, parameter in quantised.whole_parameters(model):
        parameter.data = parameter.data.to(held_in)
    inner = units(model, config)
    mesh = init_device_mesh(
        config.launcher.device,
        tuple(wanted["mesh"]["shape"]),
        mesh_dim_names=tuple(wanted["mesh"]["names"]),
    )
    shard = functools.partial(
        fully_shard,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=getattr(torch, mixed["param_dtype"]),
            reduce_dtype=getattr(torch, mixed["reduce_dtype"]),
            cast_forward_inputs=mixed["cast_forward_inputs"],
        ),
        offload_policy=CPUOffloadPolicy(pin_memory=offload["pin_memory"])
        if offload["cpu"]
        else OffloadPolicy(),
    )
    reshards = wanted["reshard_after_forward"] and (wanted["reshard_ranks"] or True)
    with _one_mesh_after_forward() if wanted["reshard_ranks"] else nullcontext():
        # The root's parameters are used first in a backward pass, too: freed after forward, which
        # an explicit True does to them as well (torch 2.13), they would be gathered again at once.
        for unit in [*inner, Unit(model, is_last=True)]:
            made = shard(unit.module, reshard_after_forward=not unit.is_last and reshards)
            if not unit.backward_needs_parameters:
                made.set_unshard_in_backward(False)
    _empty(model, config.launcher.device, "cpu" if offload["cpu"] else None)
    if quantiser is None:
        _fill(model, values)
    else:
        _fill_packed(model, values, quantiser)
    _prefetch([unit.module for unit in inner], wanted["prefetch_units"])
    # accelerate enters no_sync on every micro-batch of a step but the last.
    if not wanted["reduce_each_micro_batch"]:
        model.no_sync = functools.partial(_without_reduction, model)  # type: ignore[assignment]
    elif len(wanted["mesh"]["shape"]) > 1:
        model.no_sync = functools.partial(_within_replicas, model)  # type: ignore[assignment]
    # Accelerator.prepare_model returns a model with this mark as it is; without it accelerate 1.15
    # refuses DTensor parameters in a multi-process run because it means to wrap them in DDP.
    model._is_accelerate_prepared = True  # type: ignore[assignment]
    return model


def _empty(model: PreTrainedModel, device: str, offload_to: str | None) -> None:
    """Have the sharded parameters lie on ``device``, unless they are offloaded, and the buffers."""
    import torch

    # What `to_empty` does to parameters; buffers hold their values already.
    parameters_on = offload_to or device
    model._apply(lambda t: torch.empty_like(t, device=parameters_on) if t.is_meta else t.to(device))


def _fill(model: PreTrainedModel, values: InitialValues) -> None:
    """Give the sharded parameters their values, one value's part after the other."""
    import torch

    from shardwright.train.model.first_values import dealt_in_turn
    from shardwright.train.model.weights import Wanted

    parameters: dict[str, Any] = dict(model.named_parameters())
    wanted = [Wanted(name, p.numel(), *held(p)) for name, p in parameters.items()]
    shards = next(iter(parameters.values())).device_mesh.size(-1)
    parts = dealt_in_turn(wanted, values, shards)
    with torch.no_grad():
        for parameter, part in zip(parameters.values(), parts, strict=True):
            local = parameter.to_local()
            local.copy_(part.view(local.shape))


def _fill_packed(
    model: PreTrainedModel, values: InitialValues, quantiser: DividingQuantiser
) -> None:
    """Do the same where some are packed: of each value every rank sees all, for its scales."""
    import torch

    from shardwright.train.model.first_values import whole_in_turn

    parameters: dict[str, Any] = dict(model.named_parameters())
    wholes = whole_in_turn(quantiser.elements, values, quantiser.device)
    with torch.no_grad():
        for (name, parameter), whole in zip(parameters.items(), wholes, strict=True):
            found, local = quantiser.codes_of(name, whole), parameter.to_local()
            start, length = held(parameter)
            local.copy_(found[start : start + length].view(local.shape))
    quantiser.finish(model)


def held(parameter: DTensor) -> tuple[int, int]:
    """Return start and length of what this rank holds of a parameter, once that is flattened."""
    import math

    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    # Runs of rows, so each lies in one piece.
    assert all(p.dim == 0 for p in parameter.placements if isinstance(p, Shard))
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    if 0 in shape:  # more ranks than rows
        return 0, 0
    return offset[0] * math.prod(parameter.shape[1:]), math.prod(shape)


def _prefetch(units: Sequence[Any], count: int) -> None:
    """Gather ``count`` units ahead of their use, in forward and in backward order."""
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(list(units[i + 1 : i + 1 + count]))
        unit.set_modules_to_backward_prefetch(list(units[max(0, i - count) : i][::-1]))


@contextmanager
def _one_mesh_after_forward() -> Iterator[None]:
    """Have all units share the groups within which they are divided after forward.

    `fully_shard` (torch 2.13, `_get_post_forward_mesh_info`) makes a mesh, and so new groups of all
    ranks, for each unit that is given a number of ranks: a communicator a block, under NCCL.
    """
    from torch.distributed.fsdp._fully_shard import _fully_shard as library

    made: dict[int, Any] = {}
    make = library._get_post_forward_mesh_info

    def shared(ranks: bool | int, mesh: Any) -> Any:
        if isinstance(ranks, bool):
            return make(ranks, mesh)
        if ranks not in made:
            made[ranks] = make(ranks, mesh)
        return made[ranks]

    library._get_post_forward_mesh_info = shared  # type: ignore[assignment]
    try:
        yield
    finally:
        library._get_post_forward_mesh_info = make


@contextmanager
def _without_reduction(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def _within_replicas(model: Any) -> Iterator[None]:
    """Reduce gradients over the ranks of each replica, and leave replicas to the last time."""
    model.set_requires_all_reduce(False)
    try:
        yield
    finally:
        model.set_requires_all_reduce(True)


def sharded_as(parameter: DTensor, tensor: LazyTensor, dtype: torch.dtype) -> DTensor:
    """Return a DTensor that is sharded as ``parameter``; only this rank's part is read."""
    from torch.distributed.tensor import DTensor

    start, length = held(parameter)
    like = parameter.to_local()
    local = tensor.read(start, start + length).view(like.shape)
    return DTensor.from_local(
        local.to(like.device, dtype),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
