"""PyTorch FSDP2, applied by `fully_shard` itself.

accelerate's own FSDP path is not taken: on a CPU it falls back to DDP without a word, and its
activation checkpointing gives wrong gradients with dropout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train.config import FsdpStrategy, RunConfig, accumulation_steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from train.trainer import Trainer

_TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return the arguments of `fully_shard`, dtypes by their torch names."""
    assert isinstance(config.strategy, FsdpStrategy)
    compute_dtype = _TORCH_DTYPES[config.precision.compute_dtype]
    return {
        "mesh": {"shape": [world_size], "names": ["shard"]},
        "reshard_after_forward": config.strategy.reshard_after_forward,
        "mixed_precision": {
            "param_dtype": compute_dtype,
            "reduce_dtype": "float32",
            "cast_forward_inputs": True,
        },
    }


def training_arguments(config: RunConfig, world_size: int) -> dict[str, Any]:
    return {}


def shard(model: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    """Shard the parameters in place: each transformer block a unit, the rest in the root unit.

    Blocks come first: a parent takes whatever its children have not taken.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from train.models import blocks

    values = settings(config, dist.get_world_size())
    mixed = values["mixed_precision"]
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, mixed["param_dtype"]),
        reduce_dtype=getattr(torch, mixed["reduce_dtype"]),
        cast_forward_inputs=mixed["cast_forward_inputs"],
    )
    mesh = init_device_mesh(
        config.launcher.device,
        tuple(values["mesh"]["shape"]),
        mesh_dim_names=tuple(values["mesh"]["names"]),
    )
    for unit in [*blocks(model), model]:
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=values["reshard_after_forward"],
            mp_policy=policy,
        )
    # Accelerator.prepare_model returns a model with this mark as it is; without it accelerate 1.15
    # refuses DTensor parameters in a multi-process run because it means to wrap them in DDP.
    model._is_accelerate_prepared = True  # type: ignore[assignment]
    return model


def adopt_process_group() -> None:
    pass


def complete(trainer: Trainer) -> None:
    pass


def expected(config: RunConfig, world_size: int) -> dict[str, Any]:
    values = settings(config, world_size)
    return {
        "engine": "FSDP2",
        "world_size": world_size,
        "mesh": values["mesh"]["shape"],
        "unsharded_parameters": [],
        "master_dtypes": ["float32"],
        "compute_dtypes": [values["mixed_precision"]["param_dtype"]],
        "reduce_dtypes": [values["mixed_precision"]["reduce_dtype"]],
        "reshard_after_forward": values["reshard_after_forward"],
        "clip": config.trainer.max_grad_norm,
        "accumulation_steps": accumulation_steps(config.trainer, world_size),
    }


def read_back(trainer: Trainer) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    model = trainer.model_wrapped
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    groups = [group for unit in units for group in _parameter_groups(unit)]
    parameters = dict(model.named_parameters())
    sharded = {n: p for n, p in parameters.items() if isinstance(p, DTensor)}

    def dtypes(attribute: str) -> list[str]:
        found = {str(getattr(g.mp_policy, attribute)).removeprefix("torch.") for g in groups}
        return sorted(found)

    return {
        "engine": "FSDP2" if units else type(model).__name__,
        "world_size": dist.get_world_size(),
        "mesh": list(next(iter(sharded.values())).device_mesh.shape) if sharded else [],
        "units": len(units),
        "unsharded_parameters": sorted(set(parameters) - set(sharded)),
        "master_dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in sharded.values()}),
        "compute_dtypes": dtypes("param_dtype"),
        "reduce_dtypes": dtypes("reduce_dtype"),
        # The root keeps its parameters between forward and backward whatever was asked.
        "reshard_after_forward": all(
            group.post_forward_mesh_info is not None
            for unit in units[1:]
            for group in _parameter_groups(unit)
        ),
        "clip": trainer.args.max_grad_norm,
        "accumulation_steps": trainer.args.gradient_accumulation_steps,
    }


def after_evaluation(trainer: Trainer) -> None:
    """Shard the parameters again: without resharding after forward only a backward does it."""
    from torch.distributed.fsdp import FSDPModule

    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_parameters(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor | None]]:
    import torch
    from torch.distributed.tensor import DTensor

    for name, parameter in trainer.model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = parameter.full_tensor().detach().to("cpu", torch.float32)
        yield name, whole if trainer.is_world_process_zero() else None


def release() -> None:
    pass


def save_state(trainer: Trainer, directory: Path) -> None:
    from train.checkpoint.dcp import save_model_and_optimizer

    save_model_and_optimizer(trainer, directory)


def _parameter_groups(unit: Any) -> list[Any]:
    # torch 2.13 keeps a list and 2.11 one group or None; neither has a public way to read them.
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
