"""What a run does about a leap of its loss or gradient norm: fields of the section "trainer"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shardwright.train.config.section import PositiveFloat, PositiveInt, Section

OnSpike = Literal["ignore", "warn", "skip_update", "rollback"]


class SpikeFields(Section):
    """Steps whose loss or gradient norm is far above those of the steps before them."""

    on_spike: OnSpike = "ignore"
    """What to do about a step whose loss or gradient norm is a spike: warn says so; skip_update
    leaves its update out, and the step counts; rollback goes back to the newest checkpoint and
    skips the data that followed it, up to and including those of the spike. ignore looks at none.
    What is not finite is not a spike: it ends the run in any case."""
    spike_factor: PositiveFloat = 10.0
    """A spike is more than this many standard deviations above the median of the recent steps. They
    are estimated as 1.4826 times the median absolute deviation, and at least 1 % of the median."""
    spike_window_steps: Annotated[int, Field(ge=4)] = 100
    """How many recent steps these are, spikes among them; before there are as many, nothing is a
    spike."""
    max_rollbacks: PositiveInt = 3
    """rollback: how often the whole run goes back, at most; the next spike ends it."""
