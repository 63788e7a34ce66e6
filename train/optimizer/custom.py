"""An optimizer of the user's own, by the path of its class, once a trial has shown that it fits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from shardwright.train.config import RunConfig, TrainerConfig
from shardwright.train.config.strategy import ZeroStrategy
from shardwright.train.errors import UserError
from shardwright.train.optimizer import trial
from shardwright.train.optimizer.groups import groups_of
from shardwright.train.optimizer.kind import AdamwOf, Algorithm, Kind


def settings(trainer: TrainerConfig) -> dict[str, Any]:
    return {"lr": trainer.learning_rate}


def check(config: RunConfig) -> trial.State:
    """Return what the optimizer keeps; raise UserError where it does not fit its engine."""
    strategy = config.strategy
    is_flat = isinstance(strategy, ZeroStrategy) and strategy.stage > 0
    return trial.of(config.trainer, is_flat=is_flat)


def _build(
    config: RunConfig, model: PreTrainedModel, decayed: Collection[str], adamw: AdamwOf
) -> torch.optim.Optimizer:
    keeps = check(config)
    groups = [{**g, "algorithm": ALGORITHM} for g in groups_of(model, decayed, config.trainer)]
    optimizer = trial.made(config.trainer, groups)
    vars(optimizer)[NAMED_BY] = config.trainer.custom_class
    vars(optimizer)[KEEPS] = keeps
    return optimizer


def check_state(optimizer: torch.optim.Optimizer, name: str, found: Collection[str]) -> None:
    """Raise UserError where a checkpoint has another state of a parameter than an own optimizer.

    Its code may have changed since.
    """
    keeps: trial.State | None = vars(optimizer).get(KEEPS)
    if keeps is None or set(found) == keeps.moments:
        return
    raise UserError(
        f"{trial.KEY}={vars(optimizer)[NAMED_BY]} keeps {_listed(keeps.moments)} of each "
        f"parameter, but the checkpoint has {_listed(found)} of {name}; resume with the code that "
        "wrote it, or start a new run from its weights with model=pretrained"
    )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


ALGORITHM = "custom"
NAMED_BY = "_shardwright_named_by"
"""Attribute of a live optimizer of the user's own: the text by which its config names it."""
KEEPS = "_shardwright_keeps"
"""Another: what it keeps of each parameter."""
KIND = Kind(
    None,
    {ALGORITHM: Algorithm(settings, {"lr": "peak_learning_rate"})},
    _build,
    keeps_state=lambda optimizer: any(vars(optimizer)[KEEPS]),
)
