"""The part "trainer.profile": which steps are looked into by torch's profiler, on which ranks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from shardwright.train.config.section import NonNegativeInt, PositiveInt, Section

MOST_STEPS = 20
"""A step's trace has some ten thousand events and more, all of them in memory until the last."""


class Profile(Section):
    """Steps of a run of which a trace, a table and, on GPUs, a memory snapshot are written."""

    at_step: PositiveInt | None = None
    """The first step that is profiled; null profiles none, but for those that SIGUSR2 or a line in
    RUN_DIR/profile-request asks for."""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 3
    """How many steps in a row, each time; fewer where an evaluation or a save comes after one."""
    ranks: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] = (0,)
    """The ranks that write what they have done; the others train as ever, and wait for these."""

    @model_validator(mode="after")
    def _each_rank_once(self) -> Profile:
        if len(set(self.ranks)) < len(self.ranks):
            given = list(self.ranks)
            raise ValueError(f"ranks={given} names a rank twice; name each once")
        return self
