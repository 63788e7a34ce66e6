"""After which steps something happens besides training: every N steps, tokens or epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from shardwright.train.config.sections import Sections
from shardwright.train.config.trainer import CADENCES, TrainerConfig

DEFAULT_LOG_STEPS = 10
"""Steps between two logged ones where nobody says."""


@dataclass(frozen=True)
class Cadence:
    """How often one thing happens; never where neither is given."""

    steps: int | None = None
    samples: Fraction | None = None
    """Positions in the data from one time to the next, counted from the run's beginning."""

    def is_due(self, step: int, began: int, ended: int) -> bool:
        """Return whether it happens after a step that took the data from one position to another.

        By samples that is the first step that comes to a multiple of them, or beyond it: a
        function of what was consumed alone, so that a resume goes on as the run would have.
        """
        if self.steps is not None:
            return step % self.steps == 0
        return self.samples is not None and ended // self.samples > began // self.samples

    def __bool__(self) -> bool:
        return self.steps is not None or self.samples is not None


NEVER = Cadence()


@dataclass(frozen=True)
class Rhythm:
    """What happens after which steps of one training."""

    log: Cadence = NEVER
    evaluate: Cadence = NEVER
    save: Cadence = NEVER
    samples_at: Callable[[int], int] = field(default=lambda step: step)
    """The position in the data after so many steps of the run."""

    def is_due(self, cadence: Cadence, step: int) -> bool:
        """Return whether something happens after a step."""
        return cadence.is_due(step, self.samples_at(step - 1), self.samples_at(step))

    def is_logged(self, step: int) -> bool:
        """Return whether a step is one whose losses are logged."""
        return step == 1 or self.is_due(self.log, step)

    def is_interrupted(self, step: int, last_step: int) -> bool:
        """Return whether something long comes between a step and the next: the run may end there.

        What is agreed before it is old after it: a signal may have come meanwhile.
        """
        long = self.evaluate, self.save
        return step >= last_step or any(self.is_due(cadence, step) for cadence in long)


def rhythm(
    config: Sections,
    samples_per_epoch: int,
    samples_at: Callable[[int], int] = lambda step: step,
) -> Rhythm:
    """Return what a config asks for. Pure.

    A position is ``data.sequence_length`` tokens, in longer stages too; padding counts.
    """
    per_sample = config.tokens_per_sample
    found = {
        kind: _cadence(config.trainer, kind, per_sample, samples_per_epoch) for kind in CADENCES
    }
    log = found["log"] or Cadence(DEFAULT_LOG_STEPS)
    return Rhythm(log, found["eval"], found["save"], samples_at)


def _cadence(
    trainer: TrainerConfig, kind: str, tokens_per_sample: int, samples_per_epoch: int
) -> Cadence:
    steps, tokens, epochs = (
        getattr(trainer, f"{kind}_every_{unit}") for unit in ("steps", "tokens", "epochs")
    )
    if tokens is not None:
        return Cadence(samples=Fraction(tokens, tokens_per_sample))
    if epochs is not None:
        # As it is written: 0.1 is a hair more in binary.
        return Cadence(samples=Fraction(str(epochs)) * samples_per_epoch)
    return Cadence(steps)
