"""What a rank does in a test of what it watches: in one module of one rank a step goes wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.train.config import load
from shardwright.train.errors import Diverged
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.replay import again
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join

MODULE = "transformer.h.1.mlp"


class _NaNBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[5] = torch.nan
        return spoilt


def plant(trainer: Trainer, module: str, direction: str, step: int, micro_batch: int = 1) -> None:
    """Have one element of what a module gives, or gives back, be NaN in a micro-batch of a step."""
    layer: Any = trainer.model.get_submodule(module)
    forward, calls = layer.forward, [0, 0]

    def spoilt(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        now = trainer.state.global_step + 1
        if not trainer.model.training or now != step:
            return output
        calls[0] += 1
        if calls[0] != micro_batch:
            return output
        if direction == "backward":
            return _NaNBackward.apply(output)
        factor = torch.ones_like(output)
        factor.view(-1)[5] = torch.nan
        return output * factor

    layer.forward = spoilt


def trained_with_a_planted_nan(
    run_dir: Path, module: str, direction: str, step: int, on_rank: int, micro_batch: int = 1
) -> dict[str, Any]:
    """Train; return what the training ended with, and at which step."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _train(run_dir, rank, (module, direction, step, micro_batch), on_rank)


def replayed_with_a_planted_nan(
    directory: Path, module: str, direction: str, step: int, on_rank: int, micro_batch: int = 1
) -> None:
    """Do what a rank of a replay does, where the same goes wrong again."""
    rank = rank_from_environment()
    with join(load(directory), rank):
        _replay(directory, rank, (module, direction, step, micro_batch), on_rank)


def _replay(directory: Path, rank: Rank, planted: tuple[Any, ...], on_rank: int) -> None:
    trainer = assemble(directory, load(directory), rank, io.StringIO())
    if rank.index == on_rank:
        plant(trainer, *planted)
    again(trainer)


def _train(run_dir: Path, rank: Rank, planted: tuple[Any, ...], on_rank: int) -> dict[str, Any]:
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    if rank.index == on_rank:
        plant(trainer, *planted)
    error = None
    try:
        trainer.train()
    except Diverged as diverged:
        error = str(diverged)
    return {"error": error, "step": trainer.state.global_step}
