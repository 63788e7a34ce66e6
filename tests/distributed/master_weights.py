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
from shardwright.train.process.agreement import from_all
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join


def parameters_of(trainer: Trainer) -> list[tuple[str, Any]]:
    return list(trainer.model.named_parameters())


class MasterWeights(TrainerCallback):
    """Keeps what masters and parameters are before the first step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.found: dict[str, torch.Tensor] = {}
        self.copies: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mine = [
            (name, start, values.detach().float().numpy(force=True).copy())
            for name, start, values in self.trainer.engine.own_weights(self.trainer)
        ]
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in parameters_of(self.trainer)}
        whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
        for name, start, values in (part for rank in from_all(mine) for part in rank):
            target = whole[name].view(-1)[start : start + len(values)]
            assert target.isnan().all(), f"{name} has elements twice"
            target.copy_(torch.from_numpy(values))
        self.found = whole
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
