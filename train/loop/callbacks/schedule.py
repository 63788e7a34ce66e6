"""The learning rate goes on with every step, whether its update was skipped or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from shardwright.train.strategy.training import Training


class EveryStepCounts(TrainerCallback):
    """Advances the schedule after a step of fp16 that has overflowed, as after any other.

    transformers (5.23, Trainer._run_epoch) leaves it where accelerate says that a step was skipped,
    which accelerate (1.15) says of DeepSpeed's steps, and of those that GradScaler leaves out, but
    not of a fused optimizer's, which skips by itself. So step k has the k-th rate of the schedule
    under every engine, a run of N steps ends where its schedule does, and data and rate stay in
    step, which is what a resume counts on.
    """

    def __init__(self, trainer: Training) -> None:
        self._trainer = trainer
        self._counted = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scheduler: Any = self._trainer.lr_scheduler
        self._counted = scheduler.last_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scheduler: Any = self._trainer.lr_scheduler
        if scheduler.last_epoch == self._counted:
            # Else torch warns where it is the first step that was skipped.
            scheduler.optimizer._opt_called = True
            scheduler.step()
