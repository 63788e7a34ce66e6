"""What ZeRO is asked for, and what is read back off the live engine."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from shardwright.train.config import RankLayout, RunConfig
from shardwright.train.strategy.dtypes import TORCH_DTYPES
from shardwright.train.strategy.zero.masters import master_partitions, replicated_masters
from shardwright.train.strategy.zero.settings import settings

if TYPE_CHECKING:
    import torch

    from shardwright.train.strategy.training import Training


def expected(config: RunConfig, layout: RankLayout) -> dict[str, Any]:
    values = settings(config, layout)
    section = values["zero_optimization"]
    stage = section["stage"]
    facts = {
        "engine": "DeepSpeedEngine",
        "world_size": layout.data_parallel_size,
        "stage": stage,
        "bf16": values["bf16"]["enabled"],
        "fp16": values["fp16"]["enabled"],
        "reduce_dtype": TORCH_DTYPES[values["communication_data_type"]],
        "engine_clip": values["gradient_clipping"],
        "engine_global_batch_size": values["train_batch_size"],
        "engine_micro_batch_size": values["train_micro_batch_size_per_gpu"],
        "engine_accumulation_steps": values["gradient_accumulation_steps"],
        "parameters_sharded": stage == 3,
        "offload_optimizer": section["offload_optimizer"]["device"],
        "offload_parameters": section.get("offload_param", {}).get("device", "none"),
    }
    if stage > 0:
        facts["master_dtypes"] = [TORCH_DTYPES[config.precision.master_dtype]]
        facts["overlaps_communication"] = section["overlap_comm"]
    if stage > 1:
        facts["reduce_bucket_elements"] = section["reduce_bucket_size"]
    if stage == 3:
        facts["prefetch_elements"] = section["stage3_prefetch_bucket_size"]
        facts["persistence_elements"] = section["stage3_param_persistence_threshold"]
    return facts


def read_back(trainer: Training) -> dict[str, Any]:
    import deepspeed

    from shardwright.train.strategy import loss_scale
    from shardwright.train.strategy.dtypes import dtype_names, moments_dtypes
    from shardwright.train.strategy.zero import swapped

    engine = trainer.model_wrapped
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        return {"engine": type(engine).__name__}
    zero: Any = engine.optimizer
    stage = engine.zero_optimization_stage()

    facts = {
        **of_parameters(engine),
        "reduce_dtype": str(engine.communication_data_type).removeprefix("torch."),
        "engine_clip": engine.gradient_clipping(),
        "engine_global_batch_size": engine.train_batch_size(),
        "engine_micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "engine_accumulation_steps": engine.gradient_accumulation_steps(),
        "zero_optimizer": type(zero).__name__,
        "offload_optimizer": _device(engine.zero_offload_optimizer()),
    }
    if stage > 1:
        facts["reduce_bucket_elements"] = int(zero.reduce_bucket_size)
    if stage > 0:
        facts["master_dtypes"] = sorted(
            {str(p.dtype).removeprefix("torch.") for p in master_partitions(zero)}
        )
        # Stages 1 and 2 have a flag of their own.
        facts["overlaps_communication"] = getattr(zero, "overlap_comm", engine.zero_overlap_comm())
    if facts["offload_optimizer"] == "nvme":
        facts["optimizer_elements_on_nvme"] = swapped.elements(zero)
    computed = _most_common_dtype(engine.module)
    masters = facts.get("master_dtypes") or {m.dtype for m in replicated_masters(engine).values()}
    masters = masters or {computed}
    facts["precision"] = {
        "compute": dtype_names([computed]),
        "reduction": dtype_names([facts["reduce_dtype"]]),
        "master": dtype_names(masters),
        "moments": dtype_names(moments_dtypes(trainer.innermost_optimizer(), masters)),
    }
    return {**facts, **(loss_scaling(zero) if facts["fp16"] else loss_scale.loss_scaling(None))}


def of_parameters(engine: Any) -> dict[str, Any]:
    """Return those facts of a live engine that do not depend on its optimizer."""
    facts = {
        "engine": "DeepSpeedEngine",
        "world_size": engine.dp_world_size,
        "stage": engine.zero_optimization_stage(),
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "parameters_sharded": all(hasattr(p, "ds_id") for p in engine.module.parameters()),
        "offload_parameters": _device(engine.zero_offload_param()),
    }
    if facts["stage"] == 3:
        facts["prefetch_elements"] = engine.zero_prefetch_bucket_size()
        facts["persistence_elements"] = engine.zero_param_persistence_threshold()
    return facts


def _device(offload: Any) -> str:
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))


def _most_common_dtype(model: torch.nn.Module) -> torch.dtype:
    from shardwright.train.model.quantised import whole_parameters

    # strategy.extra can ask DeepSpeed to keep some modules in fp32.
    elements: Counter[torch.dtype] = Counter()
    for _, parameter in whole_parameters(model):
        elements[parameter.dtype] += getattr(parameter, "ds_numel", parameter.numel())
    return elements.most_common(1)[0][0]


def loss_scaling(optimizer: Any) -> dict[str, Any]:
    """Return the facts of DeepSpeed's loss scaling: stage 0 keeps them in a class of its own."""
    if (config := getattr(optimizer, "loss_scale_config", None)) is not None:
        scale, window, dynamic = config.cur_scale, config.scale_window, config.dynamic_loss_scale
    else:
        scaler = optimizer.loss_scaler
        scale, window, dynamic = scaler.cur_scale, scaler.scale_window, scaler.dynamic
    assert dynamic, "fp16.loss_scale=0 asks for it"
    return {"initial_loss_scale": float(scale), "loss_scale_growth_steps": window}
