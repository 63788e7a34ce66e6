"""Which stage of a run a position of its data is in, and which of that stage's samples follow.

Positions count samples of data.sequence_length, as long as the samples of a stage may be: a sample
four times as long is four of them. So each step takes as many tokens, a stage begins at the same
position for every batch, and what comes at a position depends on nothing before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwright.train.config import DataConfig


@dataclass(frozen=True)
class Stages:
    """The stages of a run, in their order."""

    begins: tuple[int, ...]
    """Position from which each one's samples are taken, by the steps that begin there or later."""
    lengths: tuple[int, ...]
    """Tokens in a sample of each."""
    unit: int
    """Tokens in a sample as positions count them."""
    samples_per_epoch: tuple[int, ...]

    def at(self, position: int) -> int:
        """Return the stage of a step that begins at a position."""
        return bisect_right(self.begins, position) - 1

    def size(self, stage: int, batch: int) -> int:
        """Return how many samples of a stage a step has that takes ``batch`` positions."""
        return batch * self.unit // self.lengths[stage]

    def first(self, stage: int, position: int) -> int:
        """Return the number of the first sample of a step in its stage's order, from 0.

        Steps that follow one another take samples that do, as the rules of the config have each
        batch be a whole number of samples in every stage.
        """
        return (position - self.begins[stage]) * self.unit // self.lengths[stage]


def stages_of(data: DataConfig, samples_per_epoch: Sequence[int]) -> Stages | None:
    """Return the stages that a config asks for; None where it asks for none. Pure."""
    if not data.stages:
        return None
    unit, begins, tokens = data.tokens_per_sample, [], 0
    for stage in data.stages:
        begins.append(-(-tokens // unit))
        tokens += stage.tokens or 0
    lengths = tuple(stage.sequence_length or unit for stage in data.stages)
    return Stages(tuple(begins), lengths, unit, tuple(samples_per_epoch))
