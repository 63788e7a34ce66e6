"""How many samples each optimizer step takes: a function of what was consumed before it alone.

So a run has the same batches on any number of ranks, and after a resume at any step.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache

from shardwright.train.config.trainer import TrainerConfig


@dataclass(frozen=True)
class BatchSizes:
    """The batch of a run, which may grow over its first samples.

    It grows by one sample at a time, and each size lasts for as many steps: that is how the batch
    of n samples comes to begin at a position that is quadratic in n. Positions and sizes are in
    samples.
    """

    largest: int
    smallest: int
    """At position 0."""
    warmup_samples: int = 0
    """Position from which all steps take the largest; 0 is a constant batch."""

    def at(self, position: int) -> int:
        """Return the size of the step that begins at a position."""
        if position >= self.warmup_samples:
            return self.largest
        grown = (self.largest**2 - self.smallest**2) * max(0, position) // self.warmup_samples
        return math.isqrt(self.smallest**2 + grown)

    def after(self, position: int, steps: int) -> int:
        """Return the position after so many steps from one on; before it where they are negative.

        Going back, all of them have the size of the last one.
        """
        if steps < 0:
            return position + steps * (position - self._before(position))
        levels = _levels(self, position)
        level = levels[bisect_right(levels, steps, key=lambda level: level.step) - 1]
        return level.position + (steps - level.step) * level.size

    def steps(self, position: int, until: int) -> int:
        """Return how many steps from a position on are needed to come to another, or beyond it."""
        if until <= position:
            return 0
        levels = _levels(self, position)
        level = levels[bisect_right(levels, until, key=lambda level: level.position) - 1]
        return level.step - (level.position - until) // level.size

    def _before(self, position: int) -> int:
        """Return where the step began that led to a position; the first one led to 0, too."""
        if position <= 0:
            return position - self.at(0)
        return bisect_left(range(position), position, key=lambda began: began + self.at(began))

    def _begins(self, size: int) -> int:
        """Return the first position at which a step has that size or a larger one."""
        wanted = (size**2 - self.smallest**2) * self.warmup_samples
        return -(-wanted // (self.largest**2 - self.smallest**2))


@dataclass(frozen=True)
class _Level:
    """Steps of one size, one after the other."""

    step: int
    """The first of them, counted from where the table begins."""
    position: int
    size: int


@lru_cache(maxsize=16)
def _levels(batches: BatchSizes, position: int) -> tuple[_Level, ...]:
    """Return the sizes of all steps from a position on."""
    step, levels = 0, []
    while (size := batches.at(position)) < batches.largest:
        levels.append(_Level(step, position, size))
        steps = -((position - batches._begins(size + 1)) // size)
        step, position = step + steps, position + steps * size
    return (*levels, _Level(step, position, batches.largest))


def batch_sizes(trainer: TrainerConfig) -> BatchSizes:
    """Return the batches that a config asks for. Pure."""
    largest = trainer.global_batch_size
    first = trainer.batch_warmup_from
    return BatchSizes(
        largest,
        largest if first is None else first,
        trainer.batch_warmup_samples,
    )


def part(size: int, slot: int, slots: int) -> range:
    """Return which of a step's samples one of its micro-batches takes. Pure.

    ``slots`` are the micro-batches of the step over all ranks. None takes more than one sample more
    than another.
    """
    return range(size * slot // slots, size * (slot + 1) // slots)
