"""What FSDP2 is asked for, and what is read back off the live model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.train.config import RankLayout, RunConfig
from shardwright.train.strategy.dtypes import TORCH_DTYPES
from shardwright.train.strategy.fsdp.settings import settings
from shardwright.train.strategy.fsdp.units import units

if TYPE_CHECKING:
    from shardwright.train.strategy.training import Training


def expected(config: RunConfig, layout: RankLayout) -> dict[str, Any]:
    values = settings(config, layout)
    facts = {
        "engine": "FSDP2",
        "world_size": layout.world_size,
        "mesh": dict(zip(values["mesh"]["names"], values["mesh"]["shape"], strict=True)),
        "unsharded_parameters": [],
        "master_dtypes": [TORCH_DTYPES[config.precision.master_dtype]],
        "compute_dtypes": [values["mixed_precision"]["param_dtype"]],
        "reduce_dtypes": [values["mixed_precision"]["reduce_dtype"]],
        "offloaded": values["offload"]["cpu"],
        "pinned": values["offload"]["pin_memory"],
        "last_stays_gathered": True,
        "reshard_after_forward": values["reshard_after_forward"],
        "reshard_ranks": values["reshard_ranks"],
    }
    layers = config.model.blocks
    of_words = 0 if getattr(config.model, "tie_word_embeddings", True) else 2
    if values["wrap"] == "none":
        facts["units"] = 1
    elif values["wrap"] == "transformer" and values["block_class"] is None and layers:
        facts["units"] = layers + of_words + 1
    return facts


def expected_forward_only(config: RunConfig, layout: RankLayout) -> dict[str, Any]:
    compute_dtype = TORCH_DTYPES[config.precision.compute_dtype]
    return expected(config, layout) | {"master_dtypes": [compute_dtype]}


def read_back(trainer: Training) -> dict[str, Any]:
    from shardwright.train.model.quantised import whole_parameters
    from shardwright.train.strategy.dtypes import dtype_names, moments_dtypes
    from shardwright.train.strategy.loss_scale import loss_scaling

    facts = read_back_forward_only(trainer)
    masters = {parameter.dtype for _, parameter in whole_parameters(trainer.model)}
    precision = {
        "compute": dtype_names(facts["compute_dtypes"]),
        "reduction": dtype_names(facts["reduce_dtypes"]),
        "master": dtype_names(masters),
        "moments": dtype_names(moments_dtypes(trainer.innermost_optimizer(), masters)),
    }
    return {**facts, "precision": precision, **loss_scaling(trainer.accelerator.scaler)}


def read_back_forward_only(trainer: Training) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
    from torch.distributed.tensor import DTensor

    from shardwright.train.model.quantised import whole_parameters

    model = trainer.model_wrapped
    found = [m for m in model.modules() if isinstance(m, FSDPModule)]
    kept = [unit.module for unit in units(trainer.model, trainer.config) if unit.is_last]
    last = [unit for unit in found if unit is found[0] or unit in kept]
    others = [unit for unit in found if unit not in last]
    resharded = {ranks for unit in others for ranks in _resharded_over(unit)}
    groups = [group for unit in found for group in _parameter_groups(unit)]
    parameters = dict(model.named_parameters())
    sharded = {n: p for n, p in parameters.items() if isinstance(p, DTensor)}
    meshes = [p.device_mesh for p in sharded.values()]
    whole = meshes[0].size(-1) if meshes else 1
    masters = {p.dtype for _, p in whole_parameters(model)}
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
        "last_stays_gathered": bool(found) and not any(map(_resharded_over, last)),
        "reshard_after_forward": all(map(_resharded_over, others))
        if others
        else trainer.config.strategy.reshard_after_forward,  # type: ignore[union-attr]
        "reshard_ranks": None if resharded <= {whole} else min(resharded - {whole}),
    }


def _resharded_over(unit: Any) -> set[int]:
    """Return over how many ranks a unit is divided after forward; nothing where it is not."""
    meshes = (group.post_forward_mesh_info for group in _parameter_groups(unit))
    return {mesh.shard_mesh_size for mesh in meshes if mesh is not None}


def _parameter_groups(unit: Any) -> list[Any]:
    # torch 2.13 keeps a list and 2.11 one group or None; neither has a public way to read them.
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
