"""Has the loop log, evaluate and save by what was consumed, where that is not counted in steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from shardwright.train.config import Rhythm


class Recurring(TrainerCallback):
    """Does by tokens and epochs what transformers' own flow does by steps."""

    def __init__(self, rhythm: Rhythm) -> None:
        self._rhythm = rhythm

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rhythm, step = self._rhythm, state.global_step
        is_last = step >= state.max_steps
        if rhythm.log.samples is not None and rhythm.is_logged(step):
            control.should_log = True
        if rhythm.evaluate.samples is not None:
            control.should_evaluate |= is_last or rhythm.is_due(rhythm.evaluate, step)
        if rhythm.save.samples is not None:
            control.should_save |= is_last or rhythm.is_due(rhythm.save, step)
