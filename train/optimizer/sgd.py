"""torch's SGD with momentum."""

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
        "momentum": trainer.sgd_momentum,
        "nesterov": trainer.sgd_nesterov,
    }


def _build(
    config: RunConfig, model: PreTrainedModel, decayed: Collection[str], adamw: AdamwOf
) -> torch.optim.Optimizer:
    groups = groups_of(model, decayed, config.trainer)
    return torch.optim.SGD(groups, **settings(config.trainer))


_NAMES = {"lr": "peak_learning_rate", "momentum": "momentum", "nesterov": "nesterov"}
KIND = Kind(
    "SGD",
    {"sgd": Algorithm(settings, _NAMES)},
    _build,
    keeps_state=lambda optimizer: any(group["momentum"] for group in optimizer.param_groups),
)
