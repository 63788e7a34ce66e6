"""Compile blocks for the batch that stays, once it has stopped growing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from shardwright.train.config import batch_sizes

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer


class FullBatch(TrainerCallback):
    """Forgets what was compiled while the batch grew, before the first step of the full batch.

    torch compiles the second size that it meets for any size, and would take that for the rest of
    the run (2.13, automatic dynamic shapes), though all batches to come are of one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._grew = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches = batch_sizes(self._trainer.config.trainer)
        grows = self._trainer.samples_seen < batches.warmup_samples
        if self._grew and not grows and is_compiled(self._trainer.model):
            torch.compiler.reset()
        self._grew = grows


def is_compiled(model: torch.nn.Module) -> bool:
    """Return whether torch.compile has got hold of any module."""
    return any(module._compiled_call_impl is not None for module in model.modules())
