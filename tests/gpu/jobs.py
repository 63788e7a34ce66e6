"""What the rank does in a test: train, and report what really ran."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from shardwright.train.config import load
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process.memory import peak_resident_bytes
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.distributed.jobs import trained


def observed_training(run_dir: Path) -> dict[str, Any]:
    """Train; return facts about devices, dtypes, the optimizer, the loss scale and memory."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        # The trainer has to be gone when the group is left.
        return _observe(run_dir, rank)


def _observe(run_dir: Path, rank: Rank) -> dict[str, Any]:
    on_gpu = load(run_dir).launcher.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # the worker has trained before
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    head_dtypes: set[torch.dtype] = set()
    trainer.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: head_dtypes.add(logits.dtype)
    )
    last_step = LastStepProfiler()
    trainer.add_callback(last_step)
    trainer.train()
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
        "parameter_devices": {p.device.type for p in trainer.model.parameters()},
        "head_dtypes": {str(dtype).removeprefix("torch.") for dtype in head_dtypes},
        "allow_tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "loss_scale": loss_scale(trainer),
        "operators": last_step.operators(),
    }


def state_devices(run_dir: Path) -> set[str]:
    """Train; return where the optimizer's running averages are."""

    def look(trainer: Trainer) -> set[str]:
        return {
            value.device.type
            for state in trainer.innermost_optimizer().state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.ndim > 0
        }

    return trained(run_dir, look)


class LastStepProfiler(TrainerCallback):
    """Records which operators the last step calls."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps - 1:
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.profiler.stop()

    def operators(self) -> set[str]:
        return {event.key for event in self.profiler.key_averages()}


def loss_scale(trainer: Trainer) -> float | None:
    """Return the factor on the loss at the end; None where losses are not scaled."""
    if trainer.is_deepspeed_enabled:
        engine = trainer.model_wrapped
        return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None
    scaler = trainer.accelerator.scaler
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
