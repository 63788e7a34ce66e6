"""Which parameters decay, and AdamW's settings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from train.config import RunConfig

Groups = list[dict[str, Any]]


def groups_of(
    parameters: dict[str, nn.Parameter], decayed: Collection[str], weight_decay: float
) -> Groups:
    """Return one group that decays and one that does not, without those that are empty."""
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    groups: Groups = [
        {"params": [p for n, p in trained.items() if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in trained.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw_settings(config: RunConfig) -> dict[str, Any]:
    trainer = config.trainer
    return {
        "lr": trainer.learning_rate,
        "betas": (trainer.adam_beta1, trainer.adam_beta2),
        "eps": trainer.adam_epsilon,
    }
