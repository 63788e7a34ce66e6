"""Stop where the held-out metric has not improved for a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback

if TYPE_CHECKING:
    from train.trainer import Trainer


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
        patience = config.trainer.early_stopping_patience
        if patience is None or state.global_step >= state.max_steps:
            return
        metric = config.checkpoint.best_metric
        history = [(e["step"], e[metric]) for e in state.log_history if metric in e]
        waited, best_step = without_improvement(
            history,
            threshold=config.trainer.early_stopping_threshold,
            higher_is_better=config.checkpoint.higher_is_better,
        )
        if not self._agreed(waited >= patience):
            return
        control.should_training_stop = True
        control.should_save = True
        self.trainer.log({"stopped_early": True})
        if state.is_world_process_zero:
            text = (
                f"step {state.global_step}/{state.max_steps}  stopped early: {metric} has not "
                f"improved in {waited} evaluation(s) since step {best_step}"
            )
            tqdm.write(text, file=self._console)
            self._console.flush()

    def _agreed(self, stop: bool) -> bool:
        """Return what rank 0 has decided: ranks that differ by a rounding would wait for ever."""
        if not dist.is_initialized():
            return stop
        decision = torch.tensor([int(stop)], device=self.trainer.args.device)
        dist.broadcast(decision, src=0)
        return bool(decision.item())


def without_improvement(
    history: Sequence[tuple[int, float]], *, threshold: float, higher_is_better: bool
) -> tuple[int, int]:
    """Return how many evaluations have gone by since the last improvement, and its step. Pure.

    ``history`` holds (step, value), oldest first, at least one. A value improves on the best so far
    if it is better by more than ``threshold``; NaN never does, and everything improves on NaN.
    """
    sign = 1 if higher_is_better else -1
    best_step, best = history[0]
    waited = 0
    for step, value in history[1:]:
        if sign * (value - best) > threshold or (best != best and value == value):
            best_step, best, waited = step, value, 0
        else:
            waited += 1
    return waited, best_step
