"""What a training costs, in counts that no load of the machine changes: products and bytes kept."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timed_run import stock_trainer
from shardwright.train.config import load
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join


@contextmanager
def bytes_kept() -> Iterator[list[int]]:
    """Add up what forward passes keep for their backward passes, each storage once."""
    kept: dict[int, int] = {}
    held = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)  # so that no other takes its place
        return tensor

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield total
    total.append(sum(kept.values()))


def counted(trainer: transformers.Trainer) -> dict[str, Any]:
    """Train, and return the FLOPs of its products, the bytes kept and the last loss."""
    with FlopCounterMode(display=False) as flops, bytes_kept() as kept:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"flops": flops.get_total_flops(), "bytes_kept": kept[0], "loss": losses[-1]}


def ours(run_dir: Path) -> dict[str, Any]:
    """Count what a run of ours costs, as its only rank."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return counted(assemble(run_dir, load(run_dir), rank, io.StringIO()))


def stock(run_dir: Path) -> dict[str, Any]:
    """Count what the stock Trainer does with the same model on the same batches."""
    with join(load(run_dir), rank_from_environment()):
        return counted(stock_trainer(load(run_dir), run_dir))
