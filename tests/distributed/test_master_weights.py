"""The fp32 master weights start from the initial values themselves, not from rounded ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.strategies import STRATEGIES
from train.config import load
from train.loop.trainer import Trainer
from train.model import build as models
from train.process.rank import Rank, rank_from_environment
from train.run import assemble
from train.strategy import engine_of
from train.strategy.group import join

pytestmark = pytest.mark.distributed

NAMES = (
    *("ddp", "fsdp", "zero0", "zero1", "zero2", "zero2_round_robin", "zero2_offload"),
    *("zero3", "zero3_hierarchical", "zero3_offload"),
)


class MasterWeights(TrainerCallback):
    """Keeps what the masters are before the first step, on rank 0."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.found: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, whole in engine_of(self.trainer.config).full_parameters(self.trainer):
            if whole is not None:
                self.found[name] = whole.clone()


def masters_that_differ(run_dir: Path) -> list[str] | None:
    """Return, on rank 0, the parameters whose master is not the initial value bit for bit."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _compared(run_dir, rank)


def _compared(run_dir: Path, rank: Rank) -> list[str] | None:
    trainer = assemble(run_dir, rank, io.StringIO())
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
        values[name](expected)
        if not torch.equal(masters.found[name], expected):
            differing.append(name)
    return differing


@pytest.mark.parametrize("strategy", NAMES)
def test_masters_are_the_initial_values_unrounded(
    strategy: str,
    tiny_tree: Callable[[str], dict[str, Any]],
    frozen_run: Callable[[dict[str, Any]], Path],
    ranks: Callable[[int], Any],
) -> None:
    tree = tiny_tree("clm")
    tree["model"]["vocab_size"] = 385  # a bias and rows that two ranks do not divide
    tree["strategy"] = STRATEGIES[strategy]
    tree["precision"] = {"compute_dtype": "bf16"}
    tree["trainer"]["max_steps"] = 1
    assert ranks(2)(masters_that_differ, frozen_run(tree)) == [[], None]
