"""DeepSpeed ZeRO, stages 0 to 3."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from train.config import RunConfig, ZeroStrategy, accumulation_steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from train.trainer import Trainer


def settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON, every derived field written out, explicit false included."""
    assert isinstance(config.strategy, ZeroStrategy)
    trainer, precision = config.trainer, config.precision
    return {
        "train_batch_size": trainer.global_batch_size,
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(trainer, world_size),
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": {"stage": config.strategy.stage},
        "bf16": {"enabled": precision.compute_dtype == "bf16"},
        "fp16": {
            "enabled": precision.compute_dtype == "fp16",
            "loss_scale": 0,
            "initial_scale_power": round(math.log2(precision.initial_loss_scale)),
            "loss_scale_window": precision.loss_scale_growth_steps,
            "hysteresis": 1,
        },
        # The optimizer is the same torch.optim.AdamW as under every other strategy.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        # Its own progress lines would repeat ours.
        "steps_per_print": 2**31 - 1,
    }


def training_arguments(config: RunConfig, world_size: int) -> dict[str, Any]:
    return {"deepspeed": settings(config, world_size)}


def shard(model: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    # Stage 3 has sharded it while it was built, the others shard when the engine is built.
    return model


def adopt_process_group() -> None:
    """Without it deepspeed 0.19 takes the world size for 1 while ZeRO-3 builds the model."""
    import deepspeed

    # On a CPU it would compile a shared-memory all-reduce first: a minute, or a crash where there
    # is no compiler (deepspeed 0.19 comm/torch.py, build_shm_op). gloo serves every strategy.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def complete(trainer: Trainer) -> None:
    """Mend what deepspeed 0.19 gets wrong at stage 0.

    In fp32 it drops the gradient norm. In bf16 and fp16 it makes room for the moments by a step
    with zero gradients, which decays the master weights and counts as Adam's first.
    """
    from torch.nn.utils import clip_grad_norm_, get_total_norm

    engine = trainer.model_wrapped
    if engine.zero_optimization_stage() > 0:
        return
    if masters := _replicated_masters(engine):
        if trainer.state.global_step == 0:
            engine.optimizer.optimizer.state.clear()
            for parameter, master in masters.items():
                master.data.copy_(parameter.data)
        return

    def clip() -> None:
        limit = engine.gradient_clipping()
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), limit)

    def measure(*_: Any) -> None:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        engine._global_grad_norm = get_total_norm(gradients)

    if engine.gradient_clipping() > 0:
        engine.clip_fp32_gradients = clip
    else:
        engine.optimizer.register_step_pre_hook(measure)


def _replicated_masters(engine: Any) -> dict[Any, torch.Tensor]:
    """Return the fp32 master of each bf16 or fp16 parameter at stage 0; none at other stages."""
    if engine.zero_optimization_stage() > 0 or not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {p: m for low, high in groups for p, m in zip(low, high, strict=True)}


def expected(config: RunConfig, world_size: int) -> dict[str, Any]:
    values = settings(config, world_size)
    return {
        "engine": "DeepSpeedEngine",
        "world_size": world_size,
        "stage": values["zero_optimization"]["stage"],
        "bf16": values["bf16"]["enabled"],
        "fp16": values["fp16"]["enabled"],
        "clip": values["gradient_clipping"],
        "global_batch_size": values["train_batch_size"],
        "micro_batch_size": values["train_micro_batch_size_per_gpu"],
        "accumulation_steps": values["gradient_accumulation_steps"],
        "parameters_sharded": values["zero_optimization"]["stage"] == 3,
    }


def read_back(trainer: Trainer) -> dict[str, Any]:
    import deepspeed

    engine = trainer.model_wrapped
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        return {"engine": type(engine).__name__}
    return {
        "engine": "DeepSpeedEngine",
        "world_size": engine.dp_world_size,
        "stage": engine.zero_optimization_stage(),
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "clip": engine.gradient_clipping(),
        "global_batch_size": engine.train_batch_size(),
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "accumulation_steps": engine.gradient_accumulation_steps(),
        "parameters_sharded": all(hasattr(p, "ds_id") for p in engine.module.parameters()),
        "zero_optimizer": type(engine.optimizer).__name__,
    }


def after_evaluation(trainer: Trainer) -> None:
    pass


def full_parameters(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor | None]]:
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    engine = trainer.model_wrapped
    masters = _replicated_masters(engine)
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:  # stage 0, where DeepSpeed links no master to its parameter
            whole = masters.get(parameter, parameter).detach()
        whole = whole.to("cpu", torch.float32)
        yield name, whole if trainer.is_world_process_zero() else None


def release() -> None:
    # While its config lives, transformers loads every model into ZeRO-3 shards.
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def save_state(trainer: Trainer, directory: Path) -> None:
    engine = trainer.model_wrapped
    engine.save_checkpoint(str(directory), tag="engine", exclude_frozen_parameters=False)
