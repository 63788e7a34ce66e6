"""Averages of a run's weights over its steps: fields of the section "trainer"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shardwright.train.config.section import NonNegativeInt, PositiveInt, Section

AverageKind = Literal["ema", "uniform"]


class AverageFields(Section):
    """A second set of weights, the mean of those that the steps have made."""

    average_weights: AverageKind | None = None
    """Keep an average of the weights beside them: ema moves by 1 - average_decay towards them each
    time, uniform is their plain mean. It begins as a copy, in fp32, where the master weights lie
    (host memory where those are offloaded), each rank with its part; it is in every checkpoint,
    and checkpoint.export=average makes final/ of it. null keeps none."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """ema: the share of the average that is left each time."""
    average_start_step: NonNegativeInt = 0
    """The first step whose weights count."""
    average_every_steps: PositiveInt = 1
    """Take the weights of every N-th step."""

    average_evaluated: bool = False
    """Evaluate the average beside the weights each time, as eval_average_loss and so on: twice the
    forward passes, and for them a copy of each rank's part of the weights in their place."""

    @property
    def first_averaged_step(self) -> int:
        """The first step whose weights are taken."""
        every = self.average_every_steps
        return max(-(-self.average_start_step // every), 1) * every
