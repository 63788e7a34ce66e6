"""What every engine shares and must be as asked for: batch, clip, optimizer, schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from shardwright.train.config import (
    OPTIMIZERS,
    BatchSizes,
    RankLayout,
    RunConfig,
    Schedule,
    accumulation_steps,
    batch_sizes,
    rank_layout,
)
from shardwright.train.model import adapter, quantised, rotary
from shardwright.train.optimizer import build as optimizer
from shardwright.train.optimizer.schedule import DECAYS
from shardwright.train.process import numerics

if TYPE_CHECKING:
    from shardwright.train.strategy.training import Training


def expected(config: RunConfig, layout: RankLayout, schedule: Schedule) -> dict[str, Any]:
    """Return the facts that `read_back` must find. Pure."""
    trainer = config.trainer
    return {
        "global_batch_size": trainer.global_batch_size,
        "batch_warmup": _warmup_of(batch_sizes(trainer)),
        "micro_batch_size": trainer.samples_per_pass,
        "accumulation_steps": accumulation_steps(trainer, layout),
        "clip": trainer.max_grad_norm,
        "optimizer": _expected_optimizer(config),
        "schedule": _facts_of(schedule),
        "neftune_noise_alpha": config.objective.neftune_noise_alpha,
        **_recomputed(config),
        **adapter.expected(config),
        **quantised.expected(config),
        **_precision(config),
        **expected_of_model(config),
    }


def expected_of_model(config: RunConfig) -> dict[str, Any]:
    """Return those facts on which forward passes without a training depend. Pure."""
    return {
        "fused_loss": config.trainer.fused_loss,
        **_blocks_run_as(config),
        **rotary.expected(config.model),
        **_products(config),
    }


def read_back(trainer: Training) -> dict[str, Any]:
    """Return facts read off the live loop."""
    from shardwright.train.model import activation_checkpointing, neftune

    args = trainer.args
    layout = rank_layout(trainer.config.strategy, args.world_size)
    return {
        "global_batch_size": args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * layout.data_parallel_size,
        "batch_warmup": _warmup_of(_live_batches(trainer)),
        "micro_batch_size": args.per_device_train_batch_size,
        "accumulation_steps": args.gradient_accumulation_steps,
        "clip": args.max_grad_norm,
        "optimizer": _optimizer(trainer),
        "schedule": _facts_of(_live_schedule(trainer)),
        "neftune_noise_alpha": neftune.read_back(trainer.model),
        **activation_checkpointing.read_back(trainer.model),
        **adapter.read_back(trainer.model),
        **quantised.read_back(trainer.model),
        **read_back_of_model(trainer),
    }


def read_back_of_model(trainer: Training) -> dict[str, Any]:
    """Return those facts on which forward passes without a training depend."""
    import torch

    from shardwright.train.model import activations, fp8, head_loss

    return {
        "fused_loss": head_loss.is_in(trainer.model),
        **_how_blocks_run(trainer),
        "unfused_gelus": activations.unfused(trainer.model),
        **rotary.read_back(trainer.model, trainer.config.model),
        **fp8.read_back(trainer.model),
        # Of the names that it has, the one that torch prefers (2.13).
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "deterministic": numerics.deterministic_parts(),
    }


def _warmup_of(batches: BatchSizes) -> dict[str, int] | None:
    if not batches.warmup_samples:
        return None
    return {"from": batches.smallest, "to": batches.largest, "samples": batches.warmup_samples}


def _live_batches(trainer: Training) -> BatchSizes:
    """Return the sizes by which the live loader deals out samples."""
    sampler: Any = trainer.get_train_dataloader().batch_sampler
    found: BatchSizes = sampler.batches
    return found


def _expected_optimizer(config: RunConfig) -> dict[str, Any]:
    trainer = config.trainer
    own_adam = "DeepSpeedCPUAdam" if config.strategy.has_own_adam else None
    class_name = own_adam or optimizer.asked_class(config)
    return {
        "class": class_name,
        "fused": class_name == "AdamW",
        "weight_decays": sorted({trainer.weight_decay, 0.0}),
        "algorithms": optimizer.asked(config),
    }


def _optimizer(trainer: Training) -> dict[str, Any]:
    groups = trainer.torch_optimizer().param_groups
    class_name = optimizer.class_of(trainer.innermost_optimizer())
    algorithms: dict[str, dict[str, Any]] = {}
    for group in groups:
        name, settings = optimizer.found(class_name, group)
        for setting, value in settings.items():
            known = algorithms.setdefault(name, {}).setdefault(setting, value)
            if known != value:
                algorithms[name][setting] = f"{known} and {value}"
    return {
        "class": class_name,
        # Of torch's AdamW, which has slower kernels too.
        "fused": class_name == "AdamW" and all(group.get("fused") for group in groups),
        "weight_decays": sorted({g["weight_decay"] for g in groups} | {0.0}),
        "algorithms": algorithms,
    }


def _recomputed(config: RunConfig) -> dict[str, Any]:
    every_blocks = config.trainer.recomputed_every_blocks
    facts: dict[str, Any] = {
        "checkpoint_activations_every_blocks": every_blocks,
        "recompute": None if every_blocks is None else config.trainer.recompute,
        "offload_activations": config.trainer.offload_activations,
    }
    # Pretrained weights bring their number of blocks along.
    if (layers := config.model.blocks) is not None:
        facts["recomputed_blocks"] = 0 if every_blocks is None else math.ceil(layers / every_blocks)
    return facts


def _blocks_run_as(config: RunConfig) -> dict[str, Any]:
    compiles = config.trainer.compile is True
    facts: dict[str, Any] = {"compile": compiles, "compiled_otherwise": []}
    if getattr(config.model, "fused_gelu", False):
        facts["unfused_gelus"] = 0
    if config.model.attention != "auto":
        facts["attention"] = config.model.attention
    facts["told_of_documents"] = config.data.has_bounds
    if (layers := config.model.blocks) is not None:
        facts["compiled_blocks"] = layers if compiles else 0
    return facts


def _how_blocks_run(trainer: Training) -> dict[str, Any]:
    """Return by which attention it runs, and which of its modules torch.compile has got hold of."""
    from shardwright.train.model import document_attention
    from shardwright.train.model.blocks import blocks_or_none

    # `Module.compile` leaves this; `torch.compile` wraps, as accelerate does of its own accord.
    compiled = {
        id(module): module
        for module in trainer.model_wrapped.modules()
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
    }
    found = blocks_or_none(trainer.model)  # where it has none, whatever is compiled is not one
    blocks = [compiled.pop(id(block)) for block in found if id(block) in compiled]
    attention, told = document_attention.kernel_in_use(trainer.model)
    return {
        "attention": attention,
        "told_of_documents": told,
        "compile": bool(blocks),
        "compiled_blocks": len(blocks),
        "compiled_otherwise": sorted({type(module).__name__ for module in compiled.values()}),
    }


def _products(config: RunConfig) -> dict[str, Any]:
    precision = config.precision
    recipe = precision.fp8_recipe
    facts: dict[str, Any] = {
        "tf32": precision.allow_tf32 and config.launcher.device == "cuda",
        "deterministic": list(numerics.DETERMINISTIC) if config.trainer.deterministic else [],
        "fp8_recipe": recipe,
    }
    if recipe is not None:
        facts["fp8_layers_missed"] = 0
    return facts


def _precision(config: RunConfig) -> dict[str, Any]:
    precision = config.precision
    own_bytes = OPTIMIZERS[config.trainer.optimizer].moments_bytes
    facts: dict[str, Any] = {
        "precision": {
            "compute": precision.compute_dtype,
            "reduction": "none" if config.strategy.kind == "single" else precision.reduce_dtype,
            "master": precision.master_dtype,
            "moments": precision.moments_dtype if own_bytes is None else f"{8 * own_bytes}-bit",
        },
        "loss_scale_growth_steps": None,
        "initial_loss_scale": None,
    }
    if precision.computes_in.scales_losses:
        facts["loss_scale_growth_steps"] = precision.loss_scale_growth_steps
        facts["initial_loss_scale"] = precision.initial_loss_scale
    return facts


def _live_schedule(trainer: Training) -> Schedule:
    scheduler: Any = trainer.lr_scheduler
    found: Schedule = scheduler.lr_lambdas[0]
    return found


def _facts_of(schedule: Schedule) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": schedule.name,
        "num_warmup_steps": schedule.warmup_steps,
    }
    if schedule.name not in ("constant", "inverse_sqrt", "warmup_stable_decay"):
        facts["num_training_steps"] = schedule.total_steps
    if schedule.floor:
        facts["floor"] = schedule.floor
    if schedule.name == "cosine_with_restarts":
        facts["cycles"] = schedule.cycles
    if schedule.name == "polynomial":
        facts["power"] = schedule.power
    if schedule.name == "warmup_stable_decay":
        facts["num_decay_steps"] = schedule.decay_steps
        facts["decay_type"] = DECAYS[schedule.decay_shape]
    if schedule.by_samples:
        facts["samples_per_step"] = schedule.samples_per_step
    return facts
