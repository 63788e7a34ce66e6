"""The average of the weights takes those of each step that has ended."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from shardwright.train.strategy.state.average import Average, Learned


class Averages(TrainerCallback):
    """Tells an average of each step, one that was left out for a spike or an overflow included."""

    def __init__(self, average: Average | Learned) -> None:
        self._average = average

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._average.step_ends(state.global_step)
