"""Every n steps: norms of each module's weights, gradients and updates, into metrics.jsonl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from shardwright.train.loop.numerics import sums
from shardwright.train.loop.numerics.sums import Sums
from shardwright.train.process.doubles import device_of_sums
from shardwright.train.strategy.loss_scale import loss_scale_state

if TYPE_CHECKING:
    import torch

    from shardwright.train.loop.callbacks.metrics import Metrics
    from shardwright.train.loop.trainer import Trainer


class Statistics(TrainerCallback):
    """Adds up what each rank holds, and has all ranks add that up once a measured step.

    No tensor is gathered: every engine yields each element on one rank alone.
    """

    def __init__(self, trainer: Trainer, metrics: Metrics, every_steps: int) -> None:
        self._trainer, self._metrics, self._every = trainer, metrics, every_steps
        self._modules = list(
            dict.fromkeys(sums.module_of(name) for name, _ in trainer.model.named_parameters())
        )
        self._sums: Sums | None = None
        """Of the step that is under way, if it is measured."""
        self._before: list[torch.Tensor] = []
        self._loss_scale = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.engine.before_update(self._trainer, self._measure_gradients)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, trainer = state.global_step + 1, self._trainer
        if not (step == 1 or step % self._every == 0):
            return
        self._sums = Sums(self._modules, device_of_sums(trainer.args.device))
        self._before = [w.detach().clone() for *_, w in trainer.engine.own_weights(trainer)]

    def _measure_gradients(self) -> None:
        if self._sums is None:
            return
        # Before the step, after which the scale may be another.
        self._loss_scale = loss_scale_state(self._trainer).get("scale", 1.0)
        self._sums.add(sums.GRADIENTS, self._trainer.engine.own_gradients(self._trainer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._sums is None:
            return
        measured, before, trainer = self._sums, self._before, self._trainer
        self._sums, self._before = None, []
        weights = zip(trainer.engine.own_weights(trainer), before, strict=True)
        for (name, start, now), then in weights:
            measured.add(sums.WEIGHTS, [(name, start, now)])
            measured.add(sums.UPDATES, [(name, start, then.neg_().add_(now.detach()))])
        table = trainer.accelerator.reduce(measured.table, "sum").tolist()
        if state.is_world_process_zero:
            self._metrics.write(sums.metrics(self._modules, table, self._loss_scale))
