"""Master weights of a live engine, compared with what they should be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from shardwright.train.config import load
from shardwright.train.loop.trainer import Trainer
from shardwright.train.model import build as models
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join


class MasterWeights(TrainerCallback):
    """Keeps what masters and parameters are before the first step, on rank 0."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.found: dict[str, torch.Tensor] = {}
        self.copies: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, whole in self.trainer.engine.full_parameters(self.trainer):
            if whole is not None:
                self.found[name] = whole.clone()
        if self.trainer.config.strategy.kind == "zero":
            import deepspeed

            for name, parameter in self.trainer.model.named_parameters():
                is_sharded = hasattr(parameter, "ds_id")
                with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
                    self.copies[name] = parameter.detach().clone()


def masters_that_differ(run_dir: Path) -> list[str] | None:
    """Return, on rank 0, the parameters whose master is not the initial value bit for bit.

    So are those that are not the same rounded, where they lie apart from their masters.
    """
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _compared(run_dir, rank)


def _compared(run_dir: Path, rank: Rank) -> list[str] | None:
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    masters = MasterWeights(trainer)
    trainer.add_callback(masters)
    tokenizer: Any = trainer.processing_class
    values = dict(trainer.initial_values)
    trainer.train()
    if rank.index > 0:
        return None
    model, _ = models.build(trainer.config, tokenizer)
    differing = []
    for name, parameter in model.named_parameters():
        expected = torch.empty(parameter.shape)
        values[name].write(expected)
        copy = masters.copies.get(name)
        is_rounded = copy is None or torch.equal(copy, expected.to(copy.dtype))
        if not torch.equal(masters.found[name], expected) or not is_rounded:
            differing.append(name)
    if trainer.config.strategy.kind == "zero":
        assert {copy.dtype for copy in masters.copies.values()} == {torch.bfloat16}
    return differing
