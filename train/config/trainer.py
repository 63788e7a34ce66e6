"""The section "trainer": batches, steps, optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from train.config.rank_layout import RankLayout
from train.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    unresolved,
)
from train.errors import UserError

DEFAULT_MICRO_BATCH_SIZE = 8
"""Samples that one rank passes through the model at once, at most, where nobody says."""


class TrainerConfig(Section):
    """The loop: how much, how fast, and how often something happens besides."""

    max_steps: PositiveInt | None = None
    """Optimizer steps, also where a resume changes the batch. Give exactly one of max_steps,
    max_epochs and max_tokens."""
    max_epochs: PositiveFloat | None = None
    """Passes over the training samples."""
    max_tokens: PositiveInt | None = None
    """Tokens to train on, padding left out, rounded up to a whole step."""
    global_batch_size: PositiveInt = 256
    """Samples in one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Samples in one forward pass of one rank; accumulation steps follow from it. auto is the
    largest divisor, up to 8, of a rank's part of global_batch_size."""
    eval_micro_batch_size: PositiveInt | None = None
    """Samples in one forward pass of one rank in evaluation; null is micro_batch_size."""

    optimizer: Literal["adamw", "adafactor", "muon", "adamw_8bit"] = "adamw"
    """What updates the weights; adamw_8bit keeps the moments of large tensors in 8 bits."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate; adafactor multiplies it by the RMS of each tensor."""
    lr_scheduler: Literal["linear", "cosine", "constant", "warmup_stable_decay", "inverse_sqrt"] = (
        "cosine"
    )
    """Course after the linear warm-up; linear, cosine and warmup_stable_decay end at 0."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up. Give this or warmup_fraction. Of a run of max_epochs or max_tokens
    these are steps of the batch that it began with: where a resume changes the batch, as many
    samples warm up."""
    warmup_fraction: Fraction = 0.0
    """Warm-up as a share of all steps, rounded up to whole steps."""
    decay_fraction: Fraction = 0.1
    """warmup_stable_decay: share of all steps, at the end, in which the rate falls to 0."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay, times the learning rate; biases and norms are spared."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """adamw, adamw_8bit, and what muon leaves to AdamW: decay of the mean gradient in a step."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """The same of the mean squared gradient."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the mean squared gradient."""
    muon_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the matrices; null is learning_rate, which AdamW's part always has."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the mean gradient in a step (Nesterov)."""
    muon_newton_schulz_steps: Annotated[int, Field(ge=1, le=99)] = 5
    """Iterations that make a matrix' update orthogonal."""
    muon_learning_rate_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on the rate for a matrix of A x B: 0.2 sqrt(max(A, B)), which gives updates the RMS of
    AdamW's (arXiv 2502.16982), or sqrt(max(1, A / B)), which wants muon_learning_rate near 0.02."""
    adafactor_beta2_decay: Annotated[float, Field(le=0, allow_inf_nan=False)] = -0.8
    """Exponent c: at step t the mean squared gradient moves by t**c of the way."""
    adafactor_clip_threshold: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Largest RMS of a tensor's update before learning_rate and the tensor's RMS multiply it."""
    adafactor_epsilon1: Annotated[float, Field(ge=1e-18, allow_inf_nan=False)] = 1e-15
    """Root mean squared gradients below this count as this."""
    adafactor_epsilon2: PositiveFloat = 1e-3
    """RMS of a tensor below this count as this, so that zeros can grow."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""

    log_every_steps: PositiveInt = 10
    """Log the losses every N steps, to metrics.jsonl and the terminal; step 1 is always logged."""
    eval_every_steps: PositiveInt | None = None
    """Evaluate every N steps; null evaluates once, at the end."""
    eval_max_samples: PositiveInt | None = None
    """Evaluate on this many held-out samples, the first ones; null takes all."""
    save_every_steps: PositiveInt | None = None
    """Write a checkpoint every N steps; null writes one, at the end."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without an improvement of checkpoint.best_metric;
    null never stops early."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """What counts as an improvement: more than this, in the metric's own unit."""

    checkpoint_activations_every_blocks: PositiveInt | None = None
    """Recompute activations in the backward pass, of every n-th transformer block: 1 of all (least
    memory, about a third more time), 2 of every second; null keeps all of them."""
    offload_activations: bool = False
    """Keep the inputs of recomputed blocks in host memory: still less on the GPU, slower."""
    compile: bool = False
    """torch.compile each transformer block."""
    dataloader_workers: NonNegativeInt = 0
    """Processes of each rank that assemble batches; 0 does it in the rank."""

    @property
    def samples_per_pass(self) -> int:
        """``micro_batch_size``, once the launcher has resolved it."""
        if self.micro_batch_size == "auto":
            raise unresolved("trainer.micro_batch_size")
        return self.micro_batch_size

    @property
    def eval_samples_per_pass(self) -> int:
        """The same in evaluation."""
        return self.eval_micro_batch_size or self.samples_per_pass

    @model_validator(mode="after")
    def _one_length(self) -> TrainerConfig:
        given = {k: getattr(self, k) for k in ("max_steps", "max_epochs", "max_tokens")}
        given = {k: v for k, v in given.items() if v is not None}
        if len(given) != 1:
            found = ", ".join(f"{k}={v}" for k, v in given.items()) or "none of them"
            raise ValueError(
                f"give exactly one of max_steps, max_epochs and max_tokens (got {found}); "
                "set the others to null"
            )
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction} "
                "contradict each other; set one of them to 0"
            )
        for name, field in type(self).model_fields.items():
            owner, value = name.partition("_")[0], getattr(self, name)
            unread = owner in ("muon", "adafactor") and owner != self.optimizer
            if unread and value != field.default:
                raise ValueError(
                    f"{name}={value} is read by optimizer={owner} only, but it is "
                    f"{self.optimizer}; choose optimizer={owner} or leave {name} out"
                )
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError(
                f"early_stopping_threshold={self.early_stopping_threshold:g} is read with "
                "early_stopping_patience only, which is null; set early_stopping_patience to a "
                "number of evaluations or leave early_stopping_threshold out"
            )
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than max_steps={self.max_steps}; "
                "warm up for fewer steps or train for more"
            )
        return self


def accumulation_steps(trainer: TrainerConfig, layout: RankLayout) -> int:
    """Return micro-batches per rank and step: global batch / (micro-batch x data-parallel size).

    Raises UserError where that is not a whole number.
    """
    per_pass = trainer.samples_per_pass * layout.data_parallel_size
    steps, rest = divmod(trainer.global_batch_size, per_pass)
    if rest or not steps:
        fitting = max(1, round(trainer.global_batch_size / per_pass)) * per_pass
        raise UserError(
            f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of "
            f"trainer.micro_batch_size={trainer.micro_batch_size} x {layout.data_parallel_size} "
            f"rank(s) = {per_pass}; set trainer.global_batch_size={fitting} or another micro-batch"
        )
    return steps


def largest_micro_batch(
    global_batch_size: int, layouts: Sequence[RankLayout], limit: int = DEFAULT_MICRO_BATCH_SIZE
) -> int:
    """Return the largest micro-batch, up to ``limit``, that divides a rank's part of a batch. Pure.

    ``layouts`` are all those with which the run may be trained. Raises UserError where one of them
    does not divide the batch.
    """
    parts = []
    for layout in layouts:
        ranks = layout.data_parallel_size
        part, rest = divmod(global_batch_size, ranks)
        if rest or not part:
            below, above = part * ranks, (part + 1) * ranks
            fitting = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"trainer.global_batch_size={global_batch_size} cannot be divided evenly among "
                f"{ranks} rank(s); set trainer.global_batch_size={fitting}"
            )
        parts.append(part)
    part = math.gcd(*parts)
    return next(size for size in range(min(limit, part), 0, -1) if part % size == 0)
