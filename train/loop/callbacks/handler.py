"""Events of the training, told to those callbacks alone that have something to do then."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


class Callbacks(CallbackHandler):
    """transformers' own (5.23) calls every method of every callback, most of which do nothing."""

    def __init__(self, *arguments: Any) -> None:
        self._known: list[TrainerCallback] = []
        self._busy: dict[str, list[TrainerCallback]] = {}
        super().__init__(*arguments)

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._known != self.callbacks:
            self._known, self._busy = list(self.callbacks), {}
        if event not in self._busy:
            self._busy[event] = [each for each in self.callbacks if _does_something(each, event)]
        for callback in self._busy[event]:
            result = getattr(callback, event)(
                args,
                state,
                control,
                model=self.model,
                processing_class=self.processing_class,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                train_dataloader=self.train_dataloader,
                eval_dataloader=self.eval_dataloader,
                **kwargs,
            )
            if result is not None:
                control = result
        return control


def _does_something(callback: TrainerCallback, event: str) -> bool:
    method = getattr(callback, event)
    return getattr(method, "__func__", method) is not getattr(TrainerCallback, event)
