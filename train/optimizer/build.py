"""From config and model to the one optimizer that every engine steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from shardwright.train.config import RunConfig
from shardwright.train.config.optimizers import OptimizerName
from shardwright.train.optimizer import (
    adafactor,
    adamw,
    custom,
    eight_bit,
    lion,
    muon,
    schedule_free,
    sgd,
)
from shardwright.train.optimizer.kind import AdamwOf, Kind

KINDS: dict[OptimizerName, Kind] = {
    "adamw": adamw.KIND,
    "muon": muon.KIND,
    "adafactor": adafactor.KIND,
    "adamw_8bit": eight_bit.KIND,
    "lion": lion.KIND,
    "schedule_free": schedule_free.KIND,
    "sgd": sgd.KIND,
    "custom": custom.KIND,
}


def build(
    config: RunConfig, model: PreTrainedModel, decayed: Collection[str], adamw: AdamwOf
) -> torch.optim.Optimizer:
    """Return the optimizer of the model's parameters; those named in ``decayed`` decay.

    ``adamw`` makes the engine's own of groups and settings. Raises UserError where the optimizer
    cannot work on this model, or what it is made of is not installed or cannot be compiled.
    """
    return KINDS[config.trainer.optimizer].build(config, model, decayed, adamw)


def asked(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of each algorithm that the config asks for, by our names. Pure."""
    algorithms = KINDS[config.trainer.optimizer].algorithms
    return {name: algorithm.asked(config.trainer) for name, algorithm in algorithms.items()}


def asked_class(config: RunConfig) -> str:
    """Return the class that the config asks for, or the text by which it names one. Pure."""
    return KINDS[config.trainer.optimizer].class_name or str(config.trainer.custom_class)


def class_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the same of a live optimizer."""
    found: str = vars(optimizer).get(custom.NAMED_BY, type(optimizer).__name__)
    return found


def keeps_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a live optimizer has anything of its parameters for a checkpoint."""
    if custom.NAMED_BY in vars(optimizer):
        return custom.KIND.keeps_state(optimizer)
    return _kind_of(type(optimizer).__name__).keeps_state(optimizer)


def _kind_of(class_name: str) -> Kind:
    """Return the kind of a class; one that is none of ours is an engine's own AdamW."""
    return next((kind for kind in KINDS.values() if kind.class_name == class_name), adamw.KIND)


def found(class_name: str, group: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the algorithm of a live parameter group, and its settings by our names.

    A class that is none of ours is an engine's own AdamW, where the group does not say otherwise.
    """
    kind = _kind_of(class_name)
    if group.get("algorithm") == custom.ALGORITHM:
        kind = custom.KIND
    name = group.get("algorithm", next(iter(kind.algorithms)))
    return name, kind.algorithms[name].found(group)
