"""The optimizers: what is known of each without torch, and the fields that they read.

How each is built and read back says its module in train/optimizer/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shardwright.train.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
)
from shardwright.train.own_parts import part

OptimizerName = Literal[
    "adamw", "adafactor", "muon", "adamw_8bit", "lion", "sgd", "schedule_free", "custom"
]


@dataclass(frozen=True)
class OfTheState:
    """A field by which an optimizer's state in a checkpoint is understood."""

    name: str
    reason: str
    """Why a resume cannot change it."""
    meaning: Callable[[Any], Any] = lambda value: value
    """What of its value the state depends on."""


@dataclass(frozen=True)
class OptimizerFacts:
    """What rules, estimates and texts ask of an optimizer.

    Fields of the section that begin with its name are read by it alone.
    """

    description: str
    """What it is, for the documentation."""
    moments: int | None
    """Numbers that it keeps of each parameter, at the least; None is what a field of it says."""
    moments_bytes: int | None = None
    """Bytes of each of them; None is those of precision.moments_dtype."""
    runs_adamw: bool = False
    """Whether AdamW updates some of the parameters, so that the fields adam_... are read."""
    why_not_flat: str | None = None
    """What it does that ZeRO's flat partitions of many parameters do not allow."""
    why_not_deepspeeds: str | None = None
    """Why DeepSpeed's own of the name, which does allow that, is not taken in its place."""
    takes_sharded: bool = True
    """Whether it works on FSDP's sharded tensors."""
    is_for_gpus: bool = False
    """Whether its arithmetic is too slow on a CPU to be offloaded."""
    why_fp32_masters: str | None = None
    """Why it cannot update bf16 weights."""
    takes_sharded_bf16: bool = True
    """Whether FSDP's sharded tensors may be bf16."""
    package: str | None = None
    """What has to be installed for it besides."""
    is_compiled: bool = False
    """Whether its first step needs a C++ compiler."""
    works_on_whole_matrices: bool = False
    """Whether one rank at a time works on a whole matrix of the hidden layers."""
    holds_all_updates: bool = False
    """Whether its step on a GPU holds the updates of all parameters at once."""
    averages_itself: bool = False
    """Whether what it has learned is an average that it keeps, and not the weights that it
    trains."""
    of_the_state: tuple[OfTheState, ...] = ()
    """Fields that a resume keeps, besides the optimizer itself."""
    passes: int | None = None
    """How often its step goes over the master weights; None is once over all that it keeps."""

    @property
    def quantises(self) -> bool:
        """Whether moments are kept in fewer bits than its step, and a checkpoint, has them in."""
        return self.moments_bytes is not None


OPTIMIZERS: dict[OptimizerName, OptimizerFacts] = {
    "adamw": OptimizerFacts(description="torch's fused AdamW", moments=2, runs_adamw=True),
    "muon": OptimizerFacts(
        description="torch's Muon for the matrices of hidden layers, AdamW for embeddings, head, "
        "norms and biases; takes AdamW's learning rates",
        moments=1,
        runs_adamw=True,
        why_not_flat="makes each matrix orthogonal",
        why_not_deepspeeds="0.19.8 clips and logs the norm of the updates, not of the gradients "
        "(runtime/zero/stage3.py, step: _apply_muon_to_accumulated_grads before "
        "_get_norm_groups; stage_1_and_2.py, get_flat_partition)",
        is_for_gpus=True,
        works_on_whole_matrices=True,
    ),
    "adafactor": OptimizerFacts(
        description="torch's Adafactor: a row and a column of second moments for a matrix, no "
        "first moment; its rate is a share of each tensor's RMS, 0.01 and more",
        moments=0,
        why_not_flat="factors each matrix into rows and columns",
        # torch 2.13's takes the norm of each column in place, which a sharded tensor cannot.
        takes_sharded=False,
        why_fp32_masters="its averages come to change by less than bf16 can represent",
        holds_all_updates=True,
        passes=10,  # torch 2.13, optim/_adafactor.py
    ),
    "adamw_8bit": OptimizerFacts(
        description="torchao's AdamW, whose moments take a quarter of the memory: the extra "
        "`torchao`, and a C++ compiler",
        moments=2,
        moments_bytes=1,
        runs_adamw=True,
        why_not_flat="quantises each tensor in whole blocks",
        is_for_gpus=True,
        # torchao 0.18 casts its moments by an operation that they do not have as DTensors.
        takes_sharded_bf16=False,
        package="torchao",
        is_compiled=True,
    ),
    "lion": OptimizerFacts(
        description="Lion, the sign of a mean gradient (arXiv 2302.06675): the extra `lion`; takes "
        "a third to a tenth of AdamW's rates, and as many times its weight decay",
        moments=1,
        package="lion_pytorch",
    ),
    "schedule_free": OptimizerFacts(
        description="Meta's schedule-free AdamW (arXiv 2405.15682): the extra `schedulefree`; an "
        "average of the weights, which is what is evaluated and exported, takes the place of a "
        "schedule, so `trainer.lr_scheduler=constant`; one to ten times AdamW's rates",
        moments=2,
        runs_adamw=True,
        package="schedulefree",
        # Of all tensors at once (1.4.1, adamw_schedulefree.py, step): denominators, and 26 reads
        # and writes.
        holds_all_updates=True,
        averages_itself=True,
        of_the_state=(
            OfTheState(
                "adam_beta1",
                "by it the average is told from the two sets of weights that the checkpoint has",
            ),
        ),
        passes=26,
    ),
    "sgd": OptimizerFacts(
        description="torch's SGD with momentum; its weight decay is added to the gradient, and "
        "moves through the momentum with it",
        moments=1,
        of_the_state=(
            OfTheState(
                "sgd_momentum",
                "with 0 there is no sum of gradients in a checkpoint, or none that goes on",
                bool,
            ),
        ),
    ),
    "custom": OptimizerFacts(
        description="a class of your own, `trainer.custom_class`, with `trainer.custom_options`; "
        "under ZeRO's stages 1 to 3 one that updates each element by itself ([Python](python.md))",
        moments=None,
    ),
}


Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "warmup_stable_decay",
    "inverse_sqrt",
    "range_test",
]
FALLING = ("cosine", "linear", "warmup_stable_decay", "cosine_with_restarts", "polynomial")
"""Schedules that fall to `min_learning_rate_ratio` by the end of a run."""


class OptimizerFields(Section):
    """How far and by which rule a step moves the weights."""

    optimizer: OptimizerName = "adamw"
    """What updates the weights; adamw_8bit keeps the moments of large tensors in 8 bits."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate; adafactor multiplies it by the RMS of each tensor."""
    lr_scheduler: Scheduler = "cosine"
    """Course after the linear warm-up. constant stays and inverse_sqrt falls without an end; the
    others but range_test end at min_learning_rate_ratio. range_test rises instead, from that share
    of learning_rate up to all of it, by the same factor each step: where the loss falls fastest is
    a rate to train with, and where it rises one that is too high."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of learning_rate that is left in the end; of range_test, what it begins with."""
    cosine_cycles: Annotated[int, Field(ge=2)] = 2
    """cosine_with_restarts: how often the rate falls, each time from its peak."""
    polynomial_power: PositiveFloat = 2.0
    """polynomial: the rate is the share of the steps that are left to this power; 1 is linear."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up. Give this or warmup_fraction. Of a run of max_epochs or max_tokens
    these are steps of the batch that it began with: where a resume changes the batch, as many
    samples warm up."""
    warmup_fraction: Fraction = 0.0
    """Warm-up as a share of all steps, rounded up to whole steps."""
    decay_fraction: Fraction = 0.1
    """warmup_stable_decay: share of all steps, at the end, in which the rate falls to 0."""
    decay_shape: Literal["cosine", "linear", "sqrt"] = "cosine"
    """warmup_stable_decay: how it falls. sqrt is 1 - sqrt(x) after a share x of the decay: steep at
    first (arXiv 2405.18392)."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay, times the learning rate; biases and norms are spared."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """adamw, adamw_8bit, and what muon leaves to AdamW: decay of the mean gradient in a step. Of
    schedule_free, where between its average (1) and its fast weights (0) gradients are taken."""
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
    AdamW's (arXiv 2502.16982), or sqrt(max(1, A / B)), which needs muon_learning_rate near 0.02."""
    adafactor_beta2_decay: Annotated[float, Field(le=0, allow_inf_nan=False)] = -0.8
    """Exponent c: at step t the mean squared gradient moves by t**c of the way."""
    adafactor_clip_threshold: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Largest RMS of a tensor's update before learning_rate and the tensor's RMS multiply it."""
    adafactor_epsilon1: Annotated[float, Field(ge=1e-18, allow_inf_nan=False)] = 1e-15
    """Root mean squared gradients below this count as this."""
    adafactor_epsilon2: PositiveFloat = 1e-3
    """RMS of a tensor below this count as this, so that zeros can grow."""
    lion_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the mean gradient in the one whose sign is taken."""
    lion_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the mean gradient in a step."""
    sgd_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the sum of gradients in a step."""
    sgd_nesterov: bool = False
    """Look one step of the momentum ahead; needs a momentum."""
    custom_class: str | None = None
    """Your own optimizer, as file.py:NAME or package.module:NAME: a class, or a function that makes
    one's instance, called with groups of parameters, lr=learning_rate and custom_options."""
    custom_options: dict[str, Any] = Field(default_factory=dict)
    """What else it is called with, by name."""
    custom_moments: NonNegativeInt = 2
    """Tensors of a parameter's shape that it keeps of each parameter, for the plan of a run's
    memory; a trial of the optimizer before the run counts them."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps of each parameter, at the least."""
        known = OPTIMIZERS[self.optimizer].moments
        return self.custom_moments if known is None else known

    @model_validator(mode="after")
    def _fits_the_optimizer(self) -> OptimizerFields:
        if self.lr_scheduler == "range_test":
            self._check_range_test()
        if OPTIMIZERS[self.optimizer].averages_itself and self.lr_scheduler != "constant":
            raise ValueError(
                f"optimizer={self.optimizer} needs no schedule, of which its average takes the "
                f"place, but lr_scheduler={self.lr_scheduler}; set lr_scheduler=constant, with "
                "warmup_steps where it is to warm up"
            )
        if OPTIMIZERS[self.optimizer].averages_itself and not self.adam_beta1:
            raise ValueError(
                f"adam_beta1=0 has optimizer={self.optimizer} take gradients at its fast weights, "
                "from which no average can be told; set it above 0, such as 0.9"
            )
        if OPTIMIZERS[self.optimizer].moments is None and self.custom_class is None:
            raise ValueError(
                f"optimizer={self.optimizer} takes a class of your own, but custom_class=null; set "
                "custom_class=file.py:NAME"
            )
        if self.custom_class is not None:
            part("custom_class", self.custom_class)
        if self.sgd_nesterov and not self.sgd_momentum:
            raise ValueError(
                "sgd_nesterov=true looks ahead along a momentum, but sgd_momentum=0; raise it or "
                "leave sgd_nesterov=false"
            )
        return self

    def _check_range_test(self) -> None:
        """Raise ValueError where a range test has no range, or a warm-up before it."""
        if not self.min_learning_rate_ratio:
            raise ValueError(
                "lr_scheduler=range_test rises from min_learning_rate_ratio x learning_rate, by "
                "the same factor each step, but min_learning_rate_ratio=0; set a share such as 1e-4"
            )
        for name in ("warmup_steps", "warmup_fraction"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value} is a warm-up before lr_scheduler=range_test, which is one "
                    f"itself; leave {name}=0"
                )
