"""How many optimizer steps a run has, from wherever it stands, and its learning rate at each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from shardwright.train.config.batches import BatchSizes, batch_sizes
from shardwright.train.config.sections import Sections
from shardwright.train.config.trainer import TrainerConfig


@dataclass(frozen=True)
class Progress:
    """What a run has consumed, and where its schedule has come to; all 0 at its beginning."""

    step: int = 0
    samples: int = 0
    batch_size: float | None = None
    """Samples of its last step; None at the beginning."""
    scheduled_steps: int = 0
    """Steps that the schedule has counted: all, but for those of earlier versions that overflowed
    in fp16."""
    scheduled_samples: int = 0
    """Samples of these steps."""
    samples_per_scheduled_step: float | None = None
    """global_batch_size of the run when it began; None at the beginning."""


BEGINNING = Progress()


def samples_wanted(
    config: Sections, samples_per_epoch: int | None, samples_of_tokens: int | None = None
) -> int | None:
    """Return the samples that a run trains on, from its beginning to its end. Pure.

    None where it counts in steps, or where that is not known yet. ``samples_of_tokens`` is how many
    samples, in their order, hold ``max_tokens``; it is needed only where they differ in
    length.
    """
    trainer = config.trainer
    if trainer.max_epochs is not None:
        if samples_per_epoch is None:
            return None
        # As it is written: 1.1 is a hair more in binary, and so might be a step.
        return max(1, math.ceil(Fraction(str(trainer.max_epochs)) * samples_per_epoch))
    if trainer.max_tokens is None:
        return None
    if config.data.samples_vary:
        return samples_of_tokens
    return -(-trainer.max_tokens // config.tokens_per_sample)


def total_steps(trainer: TrainerConfig, wanted: int | None, at: Progress = BEGINNING) -> int:
    """Return the steps of a whole run: those done, and as many as what is left takes. Pure.

    ``wanted`` is what `samples_wanted` returns.
    """
    if trainer.max_steps is not None:
        return trainer.max_steps
    assert wanted is not None, "the data are prepared"
    return at.step + batch_sizes(trainer).steps(at.samples, wanted)


def why_too_short(
    trainer: TrainerConfig, wanted: int | None, at: Progress, checkpoint: str
) -> str | None:
    """Return why a run of this length cannot be resumed from there, or None where it can. Pure.

    Where it ends there it can: what is left is to write final/. The last batch may go beyond what
    was wanted.
    """
    if trainer.max_steps is not None:
        if at.step <= trainer.max_steps:
            return None
        return (
            f"the run is to have {trainer.max_steps:,} steps and has {at.step:,} already "
            f"({checkpoint}); raise trainer.max_steps"
        )
    if wanted is None or at.batch_size is None or wanted > at.samples - at.batch_size:
        return None
    name = "max_epochs" if trainer.max_epochs is not None else "max_tokens"
    return (
        f"the run is to have {wanted:,} samples (trainer.{name}={getattr(trainer, name)}) and has "
        f"{at.samples:,} already ({checkpoint}); raise trainer.{name}"
    )


# --- the learning rate --------------------------------------------------------------------------


def warmup_steps(trainer: TrainerConfig, total: int) -> int:
    """Return steps of linear warm-up. Pure."""
    return trainer.warmup_steps or math.ceil(round(trainer.warmup_fraction * total, 6))


def decay_steps(trainer: TrainerConfig, total: int) -> int:
    """Return steps of the final decay of a warmup_stable_decay schedule. Pure."""
    return math.ceil(round(trainer.decay_fraction * total, 6))


@dataclass(frozen=True)
class Schedule:
    """The learning rate's course over a run, as a share of its peak.

    A run of ``max_steps`` goes by its steps. One of ``max_epochs`` or ``max_tokens`` goes by the
    samples that it has consumed, counted in steps of the global batch that it began with: whatever
    batches follow, its rate is that of an uninterrupted run that has consumed as much. In these
    steps ``warmup_steps`` is given too, so that a larger batch warms up in fewer of its own.

    torch's LambdaLR calls it with the number of steps that it has counted, and saves the fields.
    """

    name: str
    warmup_steps: int
    total_steps: int
    decay_steps: int
    decay_shape: str
    by_samples: bool
    samples_per_step: float
    """Of the global batch that the run began with."""
    batch_size: int
    """Samples of a step now, and in the end where the batch grows."""
    batch_warmup_from: int
    batch_warmup_samples: int
    first_step: int
    """Steps that the schedule had counted when the run was started or resumed."""
    first_samples: int
    """Samples of these."""
    first_position: int
    """Samples that the run had consumed then."""
    floor: float = 0.0
    """Share of the peak below which it does not fall, and from which a range test rises."""
    cycles: int = 1
    """Falls of a cosine that starts again from its peak."""
    power: float = 1.0
    """Of the share that is left, under a polynomial."""

    def samples(self, step: int) -> int:
        """Return the samples of the steps that the schedule has counted."""
        batches = BatchSizes(self.batch_size, self.batch_warmup_from, self.batch_warmup_samples)
        now = batches.after(self.first_position, step - self.first_step)
        return self.first_samples + now - self.first_position

    def position(self, step: int) -> float:
        """Return where the schedule is, in its own steps."""
        return self.samples(step) / self.samples_per_step if self.by_samples else step

    def progress(self, step: int) -> float:
        """Return which share of the run is done after so many steps that it has counted."""
        return min(1.0, max(0.0, self.position(step) / max(1, self.total_steps)))

    def progress_after(self, steps: int) -> float:
        """Return the same, of steps since the run was started or resumed."""
        return self.progress(self.first_step + steps)

    def __call__(self, step: int) -> float:
        # torch 2.13 asks for step 0 when it is built, also where a run is resumed.
        return self.share(max(0, self.position(step)))

    def share(self, position: float) -> float:
        """Return the share of the peak at a position; the arithmetic is transformers'."""
        warmup = self.warmup_steps
        if position < warmup:
            return position / warmup
        if self.name == "inverse_sqrt":
            scale = warmup or 10_000
            return 1.0 / math.sqrt((position + (scale - warmup)) / scale)
        if self.name == "range_test":
            # Each step multiplies the rate by as much, and the last one has the peak (Smith, arXiv
            # 1506.01186, on a logarithmic axis).
            return float(self.floor ** (1.0 - min(1.0, position / max(1, self.total_steps - 1))))
        if self.name == "constant":
            return 1.0
        falling = self._falling(position)
        return falling * (1.0 - self.floor) + self.floor if self.floor else falling

    def _falling(self, position: float) -> float:
        """Return what is left of the peak behind the warm-up, of a schedule that falls to 0."""
        warmup, total = self.warmup_steps, self.total_steps
        if self.name == "linear":
            return max(0.0, (total - position) / max(1, total - warmup))
        progress = (position - warmup) / max(1, total - warmup)
        if self.name == "cosine":
            return _half_cosine(progress)
        if position >= total:
            return 0.0
        if self.name == "cosine_with_restarts":
            return _half_cosine((self.cycles * progress) % 1.0)
        if self.name == "polynomial":
            return float((1.0 - progress) ** self.power)
        begin = total - self.decay_steps
        if position < begin:
            return 1.0
        return _decayed(self.decay_shape, (position - begin) / max(1, self.decay_steps))


def _half_cosine(progress: float) -> float:
    # Beyond its end it would rise again.
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))


def _decayed(shape: str, progress: float) -> float:
    if shape == "linear":
        return 1.0 - progress
    if shape == "sqrt":
        return 1.0 - math.sqrt(progress)
    return _half_cosine(progress)


def schedule_of(trainer: TrainerConfig, wanted: int | None, at: Progress = BEGINNING) -> Schedule:
    """Return the schedule of a run that starts, or is resumed, at a point. Pure."""
    batches = batch_sizes(trainer)
    per_step = at.samples_per_scheduled_step or batches.largest
    if trainer.max_steps is not None:
        total = trainer.max_steps
    else:
        assert wanted is not None, "the data are prepared"
        total = max(1, math.ceil(wanted / per_step))
    return Schedule(
        name=trainer.lr_scheduler,
        warmup_steps=warmup_steps(trainer, total),
        total_steps=total,
        decay_steps=decay_steps(trainer, total),
        decay_shape=trainer.decay_shape,
        by_samples=trainer.max_steps is None,
        samples_per_step=per_step,
        batch_size=batches.largest,
        batch_warmup_from=batches.smallest,
        batch_warmup_samples=batches.warmup_samples,
        first_step=at.scheduled_steps,
        first_samples=at.scheduled_samples,
        first_position=at.samples,
        floor=trainer.min_learning_rate_ratio,
        cycles=trainer.cosine_cycles,
        power=trainer.polynomial_power,
    )
