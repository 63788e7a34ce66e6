"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from shardwright.train.config import TrainerConfig

Groups = list[dict[str, Any]]


def groups_of(
    model: nn.Module,
    decayed: Collection[str],
    trainer: TrainerConfig,
    *,
    names: Collection[str] | None = None,
) -> Groups:
    """Return one group that decays and one that does not, without those that are empty.

    With ``names`` of these parameters only.
    """
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (names is None or name in names)
    }
    groups: Groups = [
        {
            "params": [p for name, p in trained.items() if name in decayed],
            "weight_decay": trainer.weight_decay,
        },
        {
            "params": [p for name, p in trained.items() if name not in decayed],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
