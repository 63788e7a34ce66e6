"""One rank alone, or PyTorch DDP: every rank holds the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train.config import DdpStrategy, RunConfig, accumulation_steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from train.trainer import Trainer


def settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    if not isinstance(config.strategy, DdpStrategy):
        return {}
    return {
        "bucket_cap_mb": config.strategy.bucket_size_bytes / 2**20,
        "find_unused_parameters": False,
    }


def training_arguments(config: RunConfig, world_size: int) -> dict[str, Any]:
    return {f"ddp_{key}": value for key, value in settings(config, world_size).items()}


def shard(model: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    return model


def adopt_process_group() -> None:
    pass


def complete(trainer: Trainer) -> None:
    pass


def expected(config: RunConfig, world_size: int) -> dict[str, Any]:
    dtype = config.precision.compute_dtype
    facts: dict[str, Any] = {
        "engine": "DistributedDataParallel" if config.strategy.kind == "ddp" else "none",
        "world_size": world_size,
        "parameter_dtypes": ["float32"],
        "autocast_dtype": "no" if dtype == "fp32" else dtype,
        "clip": config.trainer.max_grad_norm,
        "accumulation_steps": accumulation_steps(config.trainer, world_size),
    }
    if isinstance(config.strategy, DdpStrategy):
        facts["bucket_size_bytes"] = config.strategy.bucket_size_bytes
    return facts


def read_back(trainer: Trainer) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    model = trainer.model_wrapped
    is_ddp = isinstance(model, DistributedDataParallel)
    facts = {
        "engine": "DistributedDataParallel" if is_ddp else "none",
        "world_size": model.process_group.size() if is_ddp else 1,
        "parameter_dtypes": sorted(
            {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
        ),
        "autocast_dtype": trainer.accelerator.mixed_precision,
        "clip": trainer.args.max_grad_norm,
        "accumulation_steps": trainer.args.gradient_accumulation_steps,
    }
    if is_ddp:
        facts["bucket_size_bytes"] = model.bucket_bytes_cap
    return facts


def after_evaluation(trainer: Trainer) -> None:
    pass


def full_parameters(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor | None]]:
    import torch

    for name, parameter in trainer.model.named_parameters():
        whole = parameter.detach().to("cpu", torch.float32)
        yield name, whole if trainer.is_world_process_zero() else None


def release() -> None:
    pass


def save_state(trainer: Trainer, directory: Path) -> None:
    from train.checkpoint.dcp import save_model_and_optimizer

    save_model_and_optimizer(trainer, directory)
