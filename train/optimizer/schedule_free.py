"""Schedule-free AdamW, by Meta's schedulefree."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from transformers import PreTrainedModel

from shardwright.train.config import RunConfig, TrainerConfig
from shardwright.train.errors import UserError, not_installed
from shardwright.train.optimizer import adamw as adamw_part
from shardwright.train.optimizer.groups import groups_of
from shardwright.train.optimizer.kind import AdamwOf, Algorithm, Kind, Learned

_COUNTS = {"step": "k", "weight_sum": "weight_sum", "lr_max": "lr_max"}
"""What schedulefree keeps of a group of parameters, by our names of it among a parameter's."""


def learned(trainer: TrainerConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what makes the average of weights as they are trained and of the fast ones, in fp32.

    As schedulefree's own `eval` (1.4.1) makes it in place, where no part of a model may be.
    """
    share = 1 - 1 / trainer.adam_beta1
    return lambda trained, fast: trained.float().lerp(fast.float(), share)


def _build(
    config: RunConfig, model: PreTrainedModel, decayed: Collection[str], adamw: AdamwOf
) -> torch.optim.Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise UserError(not_installed("trainer.optimizer=schedule_free", "schedulefree")) from None

    class ScheduleFree(AdamWScheduleFree):
        """Counts steps with each parameter's state, which a checkpoint carries.

        schedulefree (1.4.1) counts in groups, at each call: of which stage 3 makes one for each of
        its own groups.
        """

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            before = [{key: group[key] for key in _COUNTS.values()} for group in self.param_groups]
            stepped = [[p for p in g["params"] if p.grad is not None] for g in self.param_groups]
            for group, parameters in zip(self.param_groups, stepped, strict=True):
                if parameters and (state := self.state[parameters[0]]):
                    # In fp32 and on the host, as a checkpoint has them.
                    group |= {key: float(state[name]) for name, key in _COUNTS.items()}
                    group["k"] = int(group["k"])
                elif parameters:
                    group |= {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}
            loss: float | None = super().step(closure)
            for group, parameters, of_group in zip(self.param_groups, stepped, before, strict=True):
                for parameter in parameters:
                    for name, key in _COUNTS.items():
                        self.state[parameter][name] = torch.tensor(float(group[key]))
                if not parameters:
                    group |= of_group
            return loss

    optimizer: torch.optim.Optimizer = ScheduleFree(
        groups_of(model, decayed, config.trainer), **adamw_part.settings(config.trainer)
    )
    optimizer.train()  # type: ignore[attr-defined]
    optimizer.state.clear()  # it has made an entry of each parameter, in whose place ZeRO's come
    return optimizer


_NAMES = {"lr": "peak_learning_rate", "betas": "betas", "eps": "epsilon"}
KIND = Kind(
    "ScheduleFree",
    {"schedule_free": Algorithm(adamw_part.settings, _NAMES)},
    _build,
    learned=Learned("z", learned),
)
