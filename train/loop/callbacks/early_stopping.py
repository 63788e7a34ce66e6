"""Stop where the held-out metric has not improved for a while."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from shardwright.train.console import progress
from shardwright.train.units import counted

if TYPE_CHECKING:
    from shardwright.train.config import RunConfig
    from shardwright.train.loop.trainer import Trainer


class EarlyStopping(TrainerCallback):
    """Ends training, with a checkpoint, by trainer.early_stopping_patience.

    It has no state of its own: it decides from the history of evaluations, which every checkpoint
    holds, so that a resumed run stops where an uninterrupted one does.
    """

    def __init__(self, trainer: Trainer, console: TextIO) -> None:
        self.trainer = trainer
        self._console = console

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.trainer.config
        if state.global_step >= state.max_steps or config.trainer.early_stopping_patience is None:
            return
        if not self._agreed(is_due(config, state.log_history)):
            return
        control.should_training_stop = True
        control.should_save = True
        waited, best_step = _without_improvement(config, state.log_history)
        self.trainer.log({"stopped_early": True})
        if state.is_world_process_zero:
            text = (
                f"step {state.global_step}/{state.max_steps}  stopped early: "
                f"{config.checkpoint.best_metric} has not improved since step {best_step}, in "
                f"{counted(waited, 'evaluation')}"
            )
            progress.write(text, self._console)

    def _agreed(self, stop: bool) -> bool:
        """Return what rank 0 has decided: ranks that differ by a rounding would wait forever."""
        if not dist.is_initialized():
            return stop
        decision = torch.tensor([int(stop)], device=self.trainer.args.device)
        dist.broadcast(decision, src=0)
        return bool(decision.item())


def is_due(config: RunConfig, log_history: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a run with this history is to stop. Pure."""
    patience = config.trainer.early_stopping_patience
    return patience is not None and _without_improvement(config, log_history)[0] >= patience


def _without_improvement(
    config: RunConfig, log_history: Sequence[Mapping[str, Any]]
) -> tuple[int, int]:
    metric = config.checkpoint.best_metric
    return without_improvement(
        [(entry["step"], entry[metric]) for entry in log_history if metric in entry],
        threshold=config.trainer.early_stopping_threshold,
        higher_is_better=config.checkpoint.higher_is_better,
    )


def without_improvement(
    history: Sequence[tuple[int, float]], *, threshold: float, higher_is_better: bool
) -> tuple[int, int]:
    """Return how many evaluations have gone by since the last improvement, and its step. Pure.

    ``history`` holds (step, value), oldest first. A value improves on the best so far
    if it is better by more than ``threshold``; NaN never does, and everything improves on NaN.
    """
    sign = 1 if higher_is_better else -1
    waited, best_step, best = 0, 0, math.nan
    for step, value in history:
        if sign * (value - best) > threshold or (math.isnan(best) and not math.isnan(value)):
            best_step, best, waited = step, value, 0
        else:
            waited += 1
    return waited, best_step
