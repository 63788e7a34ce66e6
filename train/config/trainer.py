"""The section "trainer": batches, steps, optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import model_validator

from shardwright.train.config.averages import AverageFields
from shardwright.train.config.debug import Debug
from shardwright.train.config.optimizers import OptimizerFields
from shardwright.train.config.profile import Profile
from shardwright.train.config.rank_layout import RankLayout
from shardwright.train.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Strings,
    unresolved,
)
from shardwright.train.config.spikes import SpikeFields
from shardwright.train.errors import UserError
from shardwright.train.own_parts import part

DEFAULT_MICRO_BATCH_SIZE = 8
"""Samples that one rank passes through the model at once, at most, where nobody says."""


COLLECTIVE_TIMEOUT_SECONDS = 1800
"""After which a collective raises an error where a rank has not come."""
LEAST_HANG_SECONDS = 2.0
CADENCES = ("log", "eval", "save")
"""What happens every so often, by steps, tokens or epochs."""


class Amount(Section):
    """How much is trained, and in which portions."""

    max_steps: PositiveInt | None = None
    """Optimizer steps, also where a resume changes the batch. Give exactly one of max_steps,
    max_epochs and max_tokens."""
    max_epochs: PositiveFloat | None = None
    """Passes over the training samples."""
    max_tokens: PositiveInt | None = None
    """Tokens to train on, padding left out, rounded up to a whole step."""
    global_batch_size: PositiveInt = 256
    """Samples in one optimizer step, over all ranks."""
    batch_warmup_from: PositiveInt | None = None
    """Samples in the first optimizer steps, from where the batch grows to global_batch_size over
    batch_warmup_samples, sample by sample, each size for as many steps; at least the micro-batches
    of a step over all ranks, which are smaller meanwhile. null is a constant batch."""
    batch_warmup_samples: NonNegativeInt = 0
    """Samples trained on while the batch grows, counted from the beginning of the run."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """Samples in one forward pass of one rank; accumulation steps follow from it. null is the
    largest divisor, up to 8, of a rank's part of global_batch_size; auto is the one, of all that
    divide it, with which the plan finds the run to be fastest where it is to run."""
    eval_micro_batch_size: PositiveInt | None = None
    """Samples in one forward pass of one rank in evaluation; null is micro_batch_size."""


class TrainerConfig(AverageFields, SpikeFields, OptimizerFields, Amount):
    """The loop: how much, how fast, and how often something happens besides."""

    log_every_steps: PositiveInt | None = None
    """Log the losses every N steps, to metrics.jsonl and the terminal; step 1 is always logged.
    null is 10, where neither tokens nor epochs are given: of these three one at the most."""
    log_every_tokens: PositiveInt | None = None
    """The same by tokens that the run has consumed over all ranks (samples times
    data.sequence_length, padding counted): after the step that comes to a multiple."""
    log_every_epochs: PositiveFloat | None = None
    """The same by passes over the training samples; 0.5 is twice in each."""
    eval_every_steps: PositiveInt | None = None
    """Evaluate every N steps, and at the end; null evaluates once, at the end, where neither tokens
    nor epochs are given: of these three one at the most."""
    eval_every_tokens: PositiveInt | None = None
    """The same by tokens, as log_every_tokens counts them."""
    eval_every_epochs: PositiveFloat | None = None
    """The same by passes over the training samples; 1 is once after each."""
    eval_max_samples: PositiveInt | None = None
    """Evaluate on this many held-out samples, the first ones; null takes all."""
    save_every_steps: PositiveInt | None = None
    """Write a checkpoint every N steps, and at the end; null writes one, at the end, where neither
    tokens nor epochs are given: of these three one at the most."""
    save_every_tokens: PositiveInt | None = None
    """The same by tokens, as log_every_tokens counts them."""
    save_every_epochs: PositiveFloat | None = None
    """The same by passes over the training samples; 1 is once after each."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without an improvement of checkpoint.best_metric;
    null never stops early."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """What counts as an improvement: more than this, in the metric's own unit."""

    checkpoint_activations_every_blocks: PositiveInt | Literal["auto"] | None = None
    """Recompute activations in the backward pass, of every n-th transformer block: 1 of all (least
    memory, about a third more time), 2 of every second; null keeps all of them. auto is one of
    these, as the plan finds the run to be fastest."""
    recompute: Literal["full", "selective"] = "full"
    """What of these blocks is recomputed: full is all of it, selective what is cheap, and what
    products of matrices and attention give is kept (more memory than full, less time)."""
    offload_activations: bool = False
    """Keep the inputs of recomputed blocks in host memory: still less on the GPU. They are copied
    on a stream of their own, and back before they are needed."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile each transformer block. auto does so on GPUs, but under ZeRO stage 3, whose
    hooks divide each block into pieces, and where activations are offloaded; not on CPUs. The
    run's log says into how many graphs."""
    compile_backend: str = "inductor"
    """By what blocks are compiled: inductor, or another that torch knows, such as aot_eager, which
    traces and generates no kernels."""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """inductor: how long it looks for kernels. max-autotune-no-cudagraphs times several for each
    product, which takes minutes once."""
    fused_loss: bool | Literal["auto"] = "auto"
    """Compute the head and the loss together, in pieces, so that there are never all logits at
    once: the same loss with less memory. auto does so for every model whose logits are what its
    head gives."""
    deterministic: bool = False
    """Compute by kernels alone that give the same bits each time, on a GPU too, where some of the
    fastest do not: slower. What has no such kernel ends the run."""
    dataloader_workers: NonNegativeInt | Literal["auto"] = "auto"
    """Processes of each rank that assemble batches; 0 does it in the rank. auto is 2 beside a GPU,
    which then never waits for a batch, and 0 on a CPU, whose cores are busy already."""
    collect_garbage_every_steps: PositiveInt | None = 50
    """Have Python look for garbage every N steps, on all ranks at the same one, as all wait for one
    that stops; null lets each look when it happens to."""
    callbacks: Strings = ()
    """Your own classes of transformers' TrainerCallback, as file.py:NAME or package.module:NAME:
    each rank makes one of each, without arguments, after the run's own."""
    debug: Debug = Debug()
    """What is looked at of the arithmetic itself, to find where it fails."""
    profile: Profile = Profile()
    """Steps that torch's profiler looks into, and on which ranks."""

    hang_timeout_seconds: PositiveFloat | Literal["auto"] | None = "auto"
    """End the run, to be resumed, once a rank has not moved for so long, and say which one and
    where. auto is 20 times its longest step and 120 s at least; 600 s for a batch of an evaluation;
    1,800 s for the first step and for a checkpoint, or 10 times the longest of those. A number
    holds for all of these, but a checkpoint may take 10 times the longest. A compilation gets
    1,800 s, and the start as long as it takes. null never ends it."""

    @property
    def samples_per_pass(self) -> int:
        """``micro_batch_size``, once the launcher has resolved it."""
        if not isinstance(self.micro_batch_size, int):
            left = "null" if self.micro_batch_size is None else self.micro_batch_size
            raise unresolved("trainer.micro_batch_size", left=left)
        return self.micro_batch_size

    @property
    def recomputed_every_blocks(self) -> int | None:
        """``checkpoint_activations_every_blocks``, once the launcher has resolved it."""
        if self.checkpoint_activations_every_blocks == "auto":
            raise unresolved("trainer.checkpoint_activations_every_blocks", "a number or null")
        return self.checkpoint_activations_every_blocks

    @property
    def eval_samples_per_pass(self) -> int:
        """The same in evaluation."""
        return self.eval_micro_batch_size or self.samples_per_pass

    def cadence(self, kind: str) -> dict[str, float]:
        """Return the fields that say how often something of `CADENCES` happens, none or one."""
        names = [f"{kind}_every_{unit}" for unit in ("steps", "tokens", "epochs")]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _one_cadence_of_a_kind(self) -> TrainerConfig:
        for kind in CADENCES:
            given = self.cadence(kind)
            if len(given) > 1:
                found = " and ".join(f"{name}={value}" for name, value in given.items())
                raise ValueError(
                    f"{found} say twice how often; give one of {kind}_every_steps, "
                    f"{kind}_every_tokens and {kind}_every_epochs, and set the others to null"
                )
        return self

    @model_validator(mode="after")
    def _callbacks_are_named(self) -> TrainerConfig:
        for text in self.callbacks:
            part("callbacks", text)
            if self.callbacks.count(text) > 1:
                raise ValueError(
                    f"callbacks has {text} twice, and what each keeps is saved by its name; leave "
                    "one out"
                )
        return self

    @model_validator(mode="after")
    def _compiles_as_asked(self) -> TrainerConfig:
        fields = (("compile_backend", "inductor"), ("compile_mode", "default"))
        for name, usual in fields:
            if self.compile is False and getattr(self, name) != usual:
                raise ValueError(
                    f"{name}={getattr(self, name)} is read where blocks are compiled only, but "
                    f"compile=false; set compile=true or leave {name} out"
                )
        if self.compile_mode != "default" and self.compile_backend != "inductor":
            raise ValueError(
                f"compile_mode={self.compile_mode} is one of inductor's, but "
                f"compile_backend={self.compile_backend}; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _has_checkpoints_to_go_back_to(self) -> TrainerConfig:
        if self.on_spike == "rollback" and not self.cadence("save"):
            raise ValueError(
                "on_spike=rollback goes back to a checkpoint, but save_every_steps=null writes "
                "none before the end; set save_every_steps to a number of steps, or "
                "on_spike=skip_update"
            )
        return self

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
        if (self.batch_warmup_from is None) != (self.batch_warmup_samples == 0):
            first = "null" if self.batch_warmup_from is None else self.batch_warmup_from
            raise ValueError(
                f"batch_warmup_from={first} and batch_warmup_samples={self.batch_warmup_samples} "
                "say how the batch grows only together; set both, or leave both out"
            )
        if (self.batch_warmup_from or 1) > self.global_batch_size:
            raise ValueError(
                f"batch_warmup_from={self.batch_warmup_from} is more than "
                f"global_batch_size={self.global_batch_size}, to which the batch grows; lower one "
                "or raise the other"
            )
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction} "
                "contradict each other; set one of them to 0"
            )
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError(
                f"early_stopping_threshold={self.early_stopping_threshold:g} is read with "
                "early_stopping_patience only, which is null; set early_stopping_patience to a "
                "number of evaluations or leave early_stopping_threshold out"
            )
        if isinstance(self.hang_timeout_seconds, float | int) and not (
            LEAST_HANG_SECONDS <= self.hang_timeout_seconds <= COLLECTIVE_TIMEOUT_SECONDS
        ):
            raise ValueError(
                f"hang_timeout_seconds={self.hang_timeout_seconds:g} is not between "
                f"{LEAST_HANG_SECONDS:g} and {COLLECTIVE_TIMEOUT_SECONDS:g}: a watcher looks every "
                "half a second, and a collective ends by itself, with an error, after "
                f"{COLLECTIVE_TIMEOUT_SECONDS:g} s; choose one between, auto, or null for none"
            )
        if self.compile is True and self.debug.looks_into_modules:
            asked = "numerics=watch" if self.debug.numerics == "watch" else "trace_batches"
            raise ValueError(
                f"compile=true and debug.{asked} contradict each other: compiled blocks have no "
                "modules to look into; set compile=false, or auto, which then compiles nothing"
            )
        if (
            self.max_steps is not None
            and self.average_weights is not None
            and self.first_averaged_step > self.max_steps
        ):
            raise ValueError(
                f"average_weights={self.average_weights} takes weights from step "
                f"{self.first_averaged_step} on (average_start_step={self.average_start_step}, "
                f"average_every_steps={self.average_every_steps}), behind the last one, "
                f"max_steps={self.max_steps}; begin earlier or train for more"
            )
        if self.max_steps is not None and (self.profile.at_step or 0) > self.max_steps:
            raise ValueError(
                f"profile.at_step={self.profile.at_step} is behind the last step, "
                f"max_steps={self.max_steps}; profile an earlier step or train for more"
            )
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than max_steps={self.max_steps}; "
                "warm up for fewer steps or train for more"
            )
        return self


def accumulation_steps(trainer: TrainerConfig, layout: RankLayout) -> int:
    """Return micro-batches per rank and step: global batch / (micro-batch x data-parallel size).

    Raises UserError where that is not a whole number, or more than the smallest batch has samples.
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
    slots = steps * layout.data_parallel_size
    if trainer.batch_warmup_from is not None and trainer.batch_warmup_from < slots:
        raise UserError(
            f"trainer.batch_warmup_from={trainer.batch_warmup_from} has not a sample for each of "
            f"the {slots} micro-batches of a step ({steps} accumulation steps x "
            f"{layout.data_parallel_size} rank(s)); set trainer.batch_warmup_from={slots} or more, "
            "or a larger trainer.micro_batch_size, which makes fewer of them"
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
