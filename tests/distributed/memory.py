"""What a rank holds: bytes of parameters, gradients and optimizer state on the live engine."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

import torch

from shardwright.train.config import load
from shardwright.train.plan.held import CATEGORIES, alive, held
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join


def bytes_held(run_dir: Path) -> dict[str, int]:
    """Train with accumulation; return the bytes of each kind between two micro-batches of a step.

    They are weighed from the second step on, when the optimizer has its state. What is held is held
    in every one: a thread of gloo's may keep the tensor of a finished collective for a while longer
    (torch 2.13, ProcessGroupGloo::runLoop sets its work free after it has woken who waits).
    """
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _train_and_weigh(run_dir, rank)


def _train_and_weigh(run_dir: Path, rank: Rank) -> dict[str, int]:
    gc.collect()
    before = alive()
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    found: list[dict[str, int]] = []
    step = trainer.training_step

    def weighed(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        if trainer.state.global_step == len(found) + 1:
            of_devices = held(trainer, before).values()
            found.append({kind: sum(each[kind] for each in of_devices) for kind in CATEGORIES})
        return loss

    trainer.training_step = weighed  # type: ignore[method-assign]
    trainer.train()
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    assert len(found) == trainer.state.max_steps - 1
    return {kind: min(each[kind] for each in found) for kind in CATEGORIES} | {"whole_model": whole}
