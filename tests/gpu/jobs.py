"""What the rank does in a test: train, and report what really ran."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from shardwright.train.config import load
from shardwright.train.loop.trainer import Trainer
from shardwright.train.model import head_loss
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
    last_step = LastStepProfiler()
    trainer.add_callback(last_step)
    with _dtypes_of_logits() as head_dtypes:
        trainer.train()
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
        "parameter_devices": {p.device.type for p in trainer.model.parameters()},
        "head_dtypes": {str(dtype).removeprefix("torch.") for dtype in head_dtypes},
        "allow_tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "loss_scale": loss_scale(trainer),
        "operators": last_step.operators(),
    }


@contextmanager
def _dtypes_of_logits() -> Iterator[set[torch.dtype]]:
    """Collect the dtypes of the logits that are made in the block."""
    found: set[torch.dtype] = set()
    made = head_loss._logits

    def noted(*arguments: Any) -> torch.Tensor:
        logits = made(*arguments)
        found.add(logits.dtype)
        return logits

    with mock.patch.object(head_loss, "_logits", noted):
        yield found


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


class Watch(TrainerCallback):
    """Calls a function at each event of a training that it names."""

    def __init__(self, **at: Callable[[], Any]) -> None:
        self.at = at

    def _call(self, name: str) -> None:
        if name in self.at:
            self.at[name]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._call("step_begin")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._call("save")


def where_parameters_lie(run_dir: Path) -> dict[str, Any]:
    """Train; return where sharded parameters are between two steps, and the logits within one."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _look_where_parameters_lie(run_dir, rank)


def _look_where_parameters_lie(run_dir: Path, rank: Rank) -> dict[str, Any]:
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    parameters: set[str] = set()
    logits: set[str] = set()

    def look() -> None:
        parameters.update(p.to_local().device.type for p in trainer.model.parameters())  # type: ignore[attr-defined]

    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, found: logits.add(found.device.type))
    trainer.add_callback(Watch(step_begin=look))
    trainer.train()
    look()
    return {"parameters": parameters, "logits": logits}


def as_the_second_task_of_a_node(run_dir: Path) -> dict[str, Any]:
    """Train as a rank whose local index is 1, where one GPU is in sight; return what it took."""
    rank = Rank(index=0, local_index=1, world_size=1)
    with join(load(run_dir), rank):
        return _look_at_the_device(run_dir, rank)


def _look_at_the_device(run_dir: Path, rank: Rank) -> dict[str, Any]:
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    trainer.train()
    on_gpu = trainer.args.device.type == "cuda"
    # Sharded ones as what the rank holds of them.
    parameters = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]
    devices = [trainer.args.device, *(p.device for p in parameters)]
    return {
        "in_sight": torch.cuda.device_count() if on_gpu else 1,
        "current": torch.cuda.current_device() if on_gpu else 0,
        "devices": {f"{found.type}:{found.index or 0}" for found in devices},
        "steps": trainer.state.global_step,
    }


def pinned_while_saving(run_dir: Path) -> dict[str, Any]:
    """Train; return the bytes of page-locked memory after each save has begun, beyond the first
    step's, and how many parameters there are; 0 where there is no GPU, for which nothing is pinned.
    """
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _watch_pinned(run_dir, rank)


def _watch_pinned(run_dir: Path, rank: Rank) -> dict[str, Any]:
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    begun: list[int] = []
    saved: list[int] = []

    def pinned() -> int:
        if trainer.args.device.type != "cuda":
            return 0
        return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])

    trainer.add_callback(
        Watch(step_begin=lambda: begun.append(pinned()), save=lambda: saved.append(pinned()))
    )
    trainer.train()
    return {
        "pinned": [found - begun[0] for found in saved],
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()),
    }


def failed_alone(run_dir: Path) -> float:
    """Fail in the second step; return the seconds from there until the group has been left."""
    rank = rank_from_environment()
    failed_at: list[float] = []
    try:
        with join(load(run_dir), rank):
            _fail(run_dir, rank, failed_at)
    except OnPurpose:
        return time.monotonic() - failed_at[0]
    raise AssertionError("it has trained")


class OnPurpose(Exception):
    """What a test makes a rank fail with."""


def _fail(run_dir: Path, rank: Rank, failed_at: list[float]) -> None:
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())

    def fail() -> None:
        if trainer.state.global_step == 1:
            failed_at.append(time.monotonic())
            raise OnPurpose

    trainer.add_callback(Watch(step_begin=fail))
    trainer.train()


def problems_of_the_machine(run_dir: Path) -> list[str]:
    """Return what the engine of a run needs and this machine lacks, as the check before it does."""
    from shardwright.train.strategy import engine_of

    return list(engine_of(load(run_dir), 1).machine_problems())
