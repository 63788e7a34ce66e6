"""PyTorch FSDP2, applied by `fully_shard` itself.

accelerate's own FSDP path is not taken: on a CPU it falls back to DDP without a word, and its
activation checkpointing gives wrong gradients with dropout.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from train.config import FsdpStrategy, RunConfig
from train.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

    from train.checkpoint.lazy import LazyTensor, PortableState
    from train.strategy.engine import EngineState
    from train.strategy.training import Training
    from train.weights import Values

TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return the arguments of `fully_shard`, dtypes by their torch names."""
    strategy, precision = config.strategy, config.precision
    assert isinstance(strategy, FsdpStrategy)
    if strategy.replicas > 1:
        shape, names = [strategy.replicas, world_size // strategy.replicas], ["replicate", "shard"]
    else:
        shape, names = [world_size], ["shard"]
    return {
        "mesh": {"shape": shape, "names": names},
        "wrap": strategy.wrap,
        "block_class": strategy.block_class,
        "min_unit_parameters": strategy.min_unit_parameters if strategy.wrap == "size" else None,
        "reshard_after_forward": strategy.reshard_after_forward,
        "mixed_precision": {
            "param_dtype": TORCH_DTYPES[precision.compute_dtype],
            "reduce_dtype": TORCH_DTYPES[precision.reduce_dtype],
            "cast_forward_inputs": True,
        },
        "offload": {"cpu": strategy.offload, "pin_memory": _pins(config)},
        "reduce_each_micro_batch": strategy.reduce_each_micro_batch,
        "prefetch_units": strategy.prefetch_units,
    }


def _pins(config: RunConfig) -> bool:
    # There is nothing to pin memory for without a GPU.
    assert isinstance(config.strategy, FsdpStrategy)
    return (
        config.strategy.offload and config.strategy.pin_memory and config.launcher.device == "cuda"
    )


def machine_problems(config: RunConfig) -> Iterator[str]:
    yield from ()


def training_arguments(config: RunConfig, world_size: int) -> dict[str, Any]:
    return {"bf16": config.precision.compute_dtype == "bf16"}


def shard(model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
    """Shard the parameters in place, each unit as one, then copy this rank's part of each value.

    Units within come first: a parent takes whatever its children have not taken. Raises UserError
    where the wrap policy finds no unit but the whole model.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    wanted = settings(config, dist.get_world_size())
    mixed, offload = wanted["mixed_precision"], wanted["offload"]
    master_dtype = getattr(torch, TORCH_DTYPES[config.precision.master_dtype])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(master_dtype)
    inner = units(model, config)
    mesh = init_device_mesh(
        config.launcher.device,
        tuple(wanted["mesh"]["shape"]),
        mesh_dim_names=tuple(wanted["mesh"]["names"]),
    )
    for unit in [*inner, model]:
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=wanted["reshard_after_forward"],
            mp_policy=MixedPrecisionPolicy(
                param_dtype=getattr(torch, mixed["param_dtype"]),
                reduce_dtype=getattr(torch, mixed["reduce_dtype"]),
                cast_forward_inputs=mixed["cast_forward_inputs"],
            ),
            offload_policy=CPUOffloadPolicy(pin_memory=offload["pin_memory"])
            if offload["cpu"]
            else OffloadPolicy(),
        )
    _fill(model, values, "cpu" if offload["cpu"] else config.launcher.device)
    _prefetch(inner, wanted["prefetch_units"])
    if not wanted["reduce_each_micro_batch"]:
        # accelerate enters this on every micro-batch of a step but the last.
        model.no_sync = functools.partial(_without_reduction, model)  # type: ignore[assignment]
    # Accelerator.prepare_model returns a model with this mark as it is; without it accelerate 1.15
    # refuses DTensor parameters in a multi-process run because it means to wrap them in DDP.
    model._is_accelerate_prepared = True  # type: ignore[assignment]
    return model


def _fill(model: PreTrainedModel, values: Values, device: str) -> None:
    """Make the sharded parameters real, on ``device``, one whole value after the other."""
    import torch
    from torch.distributed.tensor import DTensor

    from train.weights import in_turn

    # What `to_empty` does, but buffers hold their values already.
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    with torch.no_grad():
        for _, parameter, whole in in_turn(model.named_parameters(), values):
            assert isinstance(parameter, DTensor)
            parameter.to_local().copy_(part_of(whole, parameter))


def part_of(whole: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """Return this rank's part of ``whole``, a view, as ``parameter`` is placed on its mesh."""
    from torch.distributed.tensor import Shard

    for mesh_dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            # DTensor's own rule for shapes that do not divide: the last parts are smaller or empty.
            parts = whole.chunk(parameter.device_mesh.size(mesh_dim), placement.dim)
            rank = parameter.device_mesh.get_local_rank(mesh_dim)
            whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


def units(model: PreTrainedModel, config: RunConfig) -> list[nn.Module]:
    """Return the modules to shard as units of their own, inner ones first, without the model.

    Raises UserError where a policy that should divide the model does not.
    """
    strategy = config.strategy
    assert isinstance(strategy, FsdpStrategy)
    if strategy.wrap == "none":
        return []
    if strategy.wrap == "size":
        found = _big_enough(model, strategy.min_unit_parameters)
        if not found:
            raise UserError(
                f"strategy.wrap=size finds no module of strategy.min_unit_parameters="
                f"{strategy.min_unit_parameters:,} parameters below the whole model, which would "
                "be gathered as one; lower it, or ask for strategy.wrap=none"
            )
        return found
    if strategy.block_class is None:
        from train.models import blocks

        return blocks(model)
    found = [m for m in model.modules() if type(m).__name__ == strategy.block_class]
    if not found or found == [model]:
        classes = Counter(type(m).__name__ for m in model.modules())
        repeated = sorted(name for name, count in classes.items() if count > 1)
        raise UserError(
            f"strategy.block_class={strategy.block_class} is no class of modules in this model; "
            f"it repeats {', '.join(repeated)}; choose one, or null to infer it"
        )
    return found


def _big_enough(model: nn.Module, min_parameters: int) -> list[nn.Module]:
    """Return, inner ones first, each module with so many parameters outside of the units within."""
    from torch.nn import ModuleDict, ModuleList

    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> set[nn.Parameter]:
        left = set(module.parameters(recurse=False))
        for child in module.children():
            left |= visit(child)
        # Lists have no forward of their own to gather for, and a tied parameter needs a unit that
        # holds all its owners.
        within = set(module.modules())
        can_be = not isinstance(module, ModuleList | ModuleDict) and module is not model
        is_big = sum(p.numel() for p in left) >= min_parameters
        if can_be and is_big and all(owners[p] <= within for p in left):
            found.append(module)
            return set()
        return left

    visit(model)
    return found


def _prefetch(units: Sequence[Any], count: int) -> None:
    """Gather ``count`` units ahead of their use, in forward and in backward order."""
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(list(units[i + 1 : i + 1 + count]))
        unit.set_modules_to_backward_prefetch(list(units[max(0, i - count) : i][::-1]))


@contextmanager
def _without_reduction(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def serve(model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
    return shard(model, values, config).eval()


def adopt_process_group() -> None:
    pass


def adamw(
    config: RunConfig, groups: list[dict[str, Any]], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(groups, fused=True, **settings)


def complete(trainer: Training) -> None:
    if trainer.accelerator.scaler is None:
        trainer.gate.guard(trainer.innermost_optimizer())


def expected(config: RunConfig, world_size: int) -> dict[str, Any]:
    values = settings(config, world_size)
    facts = {
        "engine": "FSDP2",
        "world_size": world_size,
        "mesh": dict(zip(values["mesh"]["names"], values["mesh"]["shape"], strict=True)),
        "unsharded_parameters": [],
        "master_dtypes": [TORCH_DTYPES[config.precision.master_dtype]],
        "compute_dtypes": [values["mixed_precision"]["param_dtype"]],
        "reduce_dtypes": [values["mixed_precision"]["reduce_dtype"]],
        "offloaded": values["offload"]["cpu"],
        "pinned": values["offload"]["pin_memory"],
        "reshard_after_forward": values["reshard_after_forward"],
    }
    layers = getattr(config.model, "num_hidden_layers", None)
    if values["wrap"] == "none":
        facts["units"] = 1
    elif values["wrap"] == "transformer" and values["block_class"] is None and layers:
        facts["units"] = layers + 1
    return facts


def read_back(trainer: Training) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
    from torch.distributed.tensor import DTensor

    from train.strategy import loop

    model = trainer.model_wrapped
    found = [m for m in model.modules() if isinstance(m, FSDPModule)]
    groups = [group for unit in found for group in _parameter_groups(unit)]
    parameters = dict(model.named_parameters())
    sharded = {n: p for n, p in parameters.items() if isinstance(p, DTensor)}
    meshes = [p.device_mesh for p in sharded.values()]
    masters = {p.dtype for p in sharded.values()}
    policies = [group.offload_policy for group in groups]

    def dtypes(attribute: str) -> list[str]:
        found = {str(getattr(g.mp_policy, attribute)).removeprefix("torch.") for g in groups}
        return sorted(found)

    return {
        "engine": "FSDP2" if found else type(model).__name__,
        "world_size": dist.get_world_size(),
        "mesh": dict(zip(meshes[0].mesh_dim_names or (), meshes[0].shape, strict=True))
        if meshes
        else {},
        "units": len(found),
        "unsharded_parameters": sorted(set(parameters) - set(sharded)),
        "master_dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in masters),
        "compute_dtypes": dtypes("param_dtype"),
        "reduce_dtypes": dtypes("reduce_dtype"),
        "offloaded": bool(policies) and all(isinstance(p, CPUOffloadPolicy) for p in policies),
        "pinned": any(getattr(p, "pin_memory", False) for p in policies),
        # The root keeps its parameters between forward and backward whatever was asked.
        "reshard_after_forward": all(
            group.post_forward_mesh_info is not None
            for unit in found[1:]
            for group in _parameter_groups(unit)
        )
        if len(found) > 1
        else trainer.config.strategy.reshard_after_forward,  # type: ignore[union-attr]
        "precision": {
            "compute": loop.in_words(dtypes("param_dtype")),
            "reduction": loop.in_words(dtypes("reduce_dtype")),
            "master": loop.in_words(masters),
            "moments": loop.in_words(loop.moments_dtypes(trainer.innermost_optimizer(), masters)),
        },
        **loop.loss_scaling(trainer.accelerator.scaler),
    }


def restore_optimizer(trainer: Training, state: PortableState) -> None:
    from train.checkpoint.moments import check_names, entries

    optimizer = trainer.torch_optimizer()
    parameters: dict[str, Any] = dict(trainer.model.named_parameters())
    check_names(state, parameters)
    for name, parameter in parameters.items():
        take = functools.partial(_sharded_as, parameter)
        optimizer.state[parameter] = entries(optimizer, parameter, state, name, take)


def _sharded_as(parameter: DTensor, tensor: LazyTensor, dtype: torch.dtype) -> DTensor:
    """Return a DTensor that is sharded as ``parameter``; only this rank's part is read."""
    import math

    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    # Shards are runs of rows, so each lies in one piece in the flattened tensor.
    start = offset[0] * math.prod(parameter.shape[1:]) if 0 not in shape else 0
    local = tensor.read(start, start + math.prod(shape)).view(shape)
    return DTensor.from_local(
        local.to(parameter.to_local().device, dtype),
        mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def after_evaluation(trainer: Training) -> None:
    """Shard the parameters again: without resharding after forward only a backward does it."""
    from torch.distributed.fsdp import FSDPModule

    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_parameters(trainer: Training) -> Iterator[tuple[str, torch.Tensor | None]]:
    import torch
    from torch.distributed.tensor import DTensor

    for name, parameter in trainer.model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = parameter.full_tensor().detach().to("cpu", torch.float32)
        yield name, whole if trainer.is_world_process_zero() else None


def local_weights(trainer: Training) -> Iterator[torch.Tensor]:
    from torch.distributed.tensor import DTensor

    for parameter in trainer.model.parameters():
        assert isinstance(parameter, DTensor)
        yield parameter.to_local()


def release() -> None:
    pass


def clean_up(config: RunConfig) -> None:
    pass


def save_state(trainer: Training, *, is_first: bool, copy: bool) -> EngineState:
    from train.checkpoint.dcp import DistributedState

    return DistributedState(trainer, copy=copy)


def _parameter_groups(unit: Any) -> list[Any]:
    # torch 2.13 keeps a list and 2.11 one group or None; neither has a public way to read them.
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
