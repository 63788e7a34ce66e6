"""AdamW, as the engine has it."""

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
        "betas": (trainer.adam_beta1, trainer.adam_beta2),
        "eps": trainer.adam_epsilon,
    }


def _build(
    config: RunConfig, model: PreTrainedModel, decayed: Collection[str], adamw: AdamwOf
) -> torch.optim.Optimizer:
    return adamw(groups_of(model, decayed, config.trainer), settings(config.trainer))


ADAMW = Algorithm(settings, {"lr": "peak_learning_rate", "betas": "betas", "eps": "epsilon"})
KIND = Kind("AdamW", {"adamw": ADAMW}, _build)
