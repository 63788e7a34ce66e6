"""torch's Adafactor."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from shardwright.train.config import RunConfig, TrainerConfig
from shardwright.train.optimizer.groups import groups_of
from shardwright.train.optimizer.kind import AdamwOf, Algorithm, Kind


def settings(trainer: TrainerConfig) -> dict[str, Any]:
    return {
        "lr": trainer.learning_rate,
        "beta2_decay": trainer.adafactor_beta2_decay,
        "d": trainer.adafactor_clip_threshold,
        "eps": (trainer.adafactor_epsilon1, trainer.adafactor_epsilon2),
    }


def _build(
    config: RunConfig, model: PreTrainedModel, decayed: Collection[str], adamw: AdamwOf
) -> torch.optim.Optimizer:
    groups = groups_of(model, decayed, config.trainer)
    return torch.optim.Adafactor(groups, **settings(config.trainer))


_NAMES = {
    "lr": "peak_learning_rate",
    "beta2_decay": "beta2_decay",
    "d": "clip_threshold",
    "eps": "epsilons",
}
KIND = Kind("Adafactor", {"adafactor": Algorithm(settings, _NAMES)}, _build)
