"""What a rank does in a test: whole runs of the real thing, seen from inside where needed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import load
from train.rank import Rank, join, rank_from_environment
from train.run import assemble, run
from train.trainer import Trainer


def whole_run(run_dir: Path) -> None:
    """Do what `python -m train RUN_DIR` does, without its redirection of the terminal."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        run(run_dir, rank, io.StringIO())


def trained(run_dir: Path, look: Callable[[Trainer], Any]) -> Any:
    """Train, then return what ``look`` finds on the live engine of this rank."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _train_and_look(run_dir, rank, look)


def _train_and_look(run_dir: Path, rank: Rank, look: Callable[[Trainer], Any]) -> Any:
    # Its own frame, so that nothing holds the trainer when the group is left.
    trainer = assemble(run_dir, rank, io.StringIO())
    trainer.train()
    return look(trainer)


def trained_with_broken_engine(run_dir: Path, damage: str) -> None:
    """Train with settings that were changed behind the config's back, as a silent fallback does."""
    from unittest import mock

    import torch

    from train.strategy import fsdp, zero

    sound_settings = zero.settings

    def other_stage(config: Any, world_size: int) -> dict[str, Any]:
        values = sound_settings(config, world_size)
        return {**values, "zero_optimization": {"stage": 2}}

    def assemble_and_train() -> None:
        if damage == "stage":
            with mock.patch.object(
                zero, "training_arguments", lambda c, w: {"deepspeed": other_stage(c, w)}
            ):
                trainer = assemble(run_dir, rank, io.StringIO())
        elif damage == "fall_back_to_ddp":
            with mock.patch.object(fsdp, "shard", lambda model, config: model):
                trainer = assemble(run_dir, rank, io.StringIO())
        else:
            trainer = assemble(run_dir, rank, io.StringIO())
            torch.nn.Module.to(trainer.model, torch.bfloat16)
        trainer.train()

    rank = rank_from_environment()
    with join(load(run_dir), rank):
        assemble_and_train()
