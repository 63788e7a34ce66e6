"""Lion, by lion-pytorch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from shardwright.train.config import RunConfig, TrainerConfig
from shardwright.train.errors import UserError, not_installed
from shardwright.train.optimizer.groups import groups_of
from shardwright.train.optimizer.kind import AdamwOf, Algorithm, Kind


def settings(trainer: TrainerConfig) -> dict[str, Any]:
    return {"lr": trainer.learning_rate, "betas": (trainer.lion_beta1, trainer.lion_beta2)}


def _build(
    config: RunConfig, model: PreTrainedModel, decayed: Collection[str], adamw: AdamwOf
) -> torch.optim.Optimizer:
    try:
        from lion_pytorch import Lion
    except ImportError:
        raise UserError(not_installed("trainer.optimizer=lion", "lion-pytorch")) from None
    found: torch.optim.Optimizer = Lion(
        groups_of(model, decayed, config.trainer), **settings(config.trainer)
    )
    return found


_NAMES = {"lr": "peak_learning_rate", "betas": "betas"}
KIND = Kind("Lion", {"lion": Algorithm(settings, _NAMES)}, _build)
