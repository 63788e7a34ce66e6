"""What each optimizer says of itself: how it is built, and by which settings it is known again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from shardwright.train.config import RunConfig, TrainerConfig
from shardwright.train.optimizer.groups import Groups

AdamwOf = Callable[[Groups, dict[str, Any]], torch.optim.Optimizer]
"""Makes the engine's own AdamW of groups and settings."""


@dataclass(frozen=True)
class Algorithm:
    """How an optimizer updates all of its parameter groups, or some."""

    settings: Callable[[TrainerConfig], dict[str, Any]]
    """Returns what these groups hold, by torch's names; "lr" is the peak rate."""
    names: Mapping[str, str]
    """Our names of these settings."""

    def asked(self, trainer: TrainerConfig) -> dict[str, Any]:
        """Return the settings that the config asks for, by our names. Pure."""
        return self._by_our_names(self.settings(trainer))

    def found(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same of a live parameter group, whose rate its schedule has changed."""
        return self._by_our_names({**group, "lr": group.get("initial_lr")})

    def _by_our_names(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {ours: _plain(values.get(theirs)) for theirs, ours in self.names.items()}


def _plain(value: Any) -> Any:
    """Return a setting as JSON has it, in the seven digits that torchao keeps of a rate."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float | torch.Tensor):
        return float(f"{float(value):.7g}")
    return value


@dataclass(frozen=True)
class Learned:
    """What an optimizer has learned, where that is not the weights that it trains."""

    moment: str
    """The one of its tensors that this takes besides the weights."""
    of: Callable[[TrainerConfig], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
    """Returns what makes it in fp32 of the same elements of weights and moment."""


@dataclass(frozen=True)
class Kind:
    """One choice of trainer.optimizer."""

    class_name: str | None
    """Of what `build` returns, unless the engine has an AdamW of its own. None where the config
    names the class."""
    algorithms: Mapping[str, Algorithm]
    """By name; where there are several, the ``algorithm`` of a parameter group says which."""
    build: Callable[[RunConfig, PreTrainedModel, Collection[str], AdamwOf], torch.optim.Optimizer]
    """Takes what `shardwright.train.optimizer.build.build` takes."""
    learned: Learned | None = None
    """None where that are the weights."""
    keeps_state: Callable[[torch.optim.Optimizer], bool] = lambda optimizer: True
    """Whether a live one, once it has stepped, has anything of its parameters for a checkpoint."""
