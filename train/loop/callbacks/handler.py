"""Events of the training, told to those callbacks alone that have something to do then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from shardwright.train.config.own import CALLBACKS
from shardwright.train.own_parts import said


class Callbacks(CallbackHandler):
    """transformers' own (5.23) calls every method of every callback, most of which do nothing."""

    def __init__(self, *arguments: Any) -> None:
        self._known: list[TrainerCallback] = []
        self._busy: dict[str, list[TrainerCallback]] = {}
        self.name_of: Callable[[TrainerCallback], str | None] = lambda callback: None
        """Returns the text that names one of the user's own."""
        super().__init__(*arguments)

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._known != self.callbacks:
            self._known, self._busy = list(self.callbacks), {}
        if event not in self._busy:
            self._busy[event] = [each for each in self.callbacks if _does_something(each, event)]
        for callback in self._busy[event]:
            result = self.tell(callback, event, args, state, control, **kwargs)
            if result is not None:
                control = result
        return control

    def tell(
        self,
        callback: TrainerCallback,
        event: str,
        args: Any,
        state: Any,
        control: Any,
        **kwargs: Any,
    ) -> Any:
        """Tell one callback of an event; what one of the user's raises names it."""
        try:
            return getattr(callback, event)(
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
        except Exception as error:
            if (text := self.name_of(callback)) is None:
                raise
            raise RuntimeError(
                f"{CALLBACKS}={text} failed in {event} at step {state.global_step}: {said(error)}"
            ) from error


def _does_something(callback: TrainerCallback, event: str) -> bool:
    method = getattr(callback, event)
    return getattr(method, "__func__", method) is not getattr(TrainerCallback, event)
