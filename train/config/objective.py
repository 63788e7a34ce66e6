"""The section "objective": what the model learns to predict."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from shardwright.train.config.section import Fraction, NonNegativeFloat, Section, Strings
from shardwright.train.config.spans import SpanCounts, counts_of_inputs
from shardwright.train.own_parts import part


class LossFields(Section):
    """What training minimises besides the cross entropy of the labels, and is disturbed by."""

    is_masked: ClassVar[bool] = False
    """Whether masked tokens are predicted from all around them, and not the next one."""
    is_encoder_decoder: ClassVar[bool] = False
    """Whether one stack of blocks reads a sample and another one writes what is to be predicted."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a label's probability that all tokens of the vocabulary get alike."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits small (PaLM
    trains with 1e-4)."""
    loss: str | None = None
    """Your own function in place of the cross entropy, as file.py:NAME or package.module:NAME: of
    logits (positions, vocabulary) and labels (positions) it returns each position's loss. null is
    the cross entropy."""
    neftune_noise_alpha: NonNegativeFloat = 0.0
    """Add noise to the input embeddings in training, even in +-alpha / sqrt(length x width) (arXiv
    2310.05914 takes 5 to 15); 0 adds none."""

    def positions(self, sequence_length: int) -> int:
        """Return how many tokens the model computes of a sample of that length. Pure."""
        return sequence_length

    @model_validator(mode="after")
    def _loss_is_whole(self) -> LossFields:
        if self.loss is None:
            return self
        part("loss", self.loss)
        for name in ("label_smoothing", "z_loss"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value:g} changes the cross entropy, in whose place loss={self.loss} "
                    f"is computed; leave {name}=0 and let that function do it"
                )
        return self


MaskingRate = Annotated[float, Field(gt=0, lt=1)]


class MaskedFields(LossFields):
    """What all objectives of masked tokens have."""

    is_masked: ClassVar[bool] = True

    head_on_labels_only: bool = True
    """Compute the head where a token is to be predicted alone: the same loss for less work."""

    @property
    @abstractmethod
    def largest_masked_share(self) -> float:
        """Of a sample's tokens the share to predict, at most."""

    @property
    @abstractmethod
    def mean_masked_share(self) -> float:
        """The same on average over a run."""


class MlmObjective(MaskedFields):
    """Masked language modelling."""

    kind: Literal["mlm"]
    masking_rate: MaskingRate = 0.15
    """Share of tokens to predict; with masking_rate_final, where the run begins."""
    masking_rate_final: MaskingRate | None = None
    """Share of tokens to predict where the run ends; null keeps masking_rate throughout."""
    masking_rate_schedule: Literal["linear", "cosine", "step"] = "linear"
    """How the rate comes from masking_rate to masking_rate_final over the run: by as much in each
    step, along half a cosine, or at once, at masking_rate_step_at."""
    masking_rate_step_at: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Under masking_rate_schedule=step, the share of the run after which the rate is the final
    one."""
    eval_masking_rate: MaskingRate | None = None
    """Share of tokens to predict in held-out samples, the same at each evaluation; null takes
    masking_rate."""
    mask_token_share: Fraction = 0.8
    """Of these, replaced by the mask token."""
    random_token_share: Fraction = 0.1
    """Of these, replaced by a random token; the rest stay as they are."""
    whole_word: bool = False
    """Mask all tokens of a word together."""
    prompts: Strings = ()
    """Sentences with <mask>, filled by the trained model when the run ends."""

    @model_validator(mode="after")
    def _shares_fit(self) -> MlmObjective:
        total = self.mask_token_share + self.random_token_share
        if total > 1 + 1e-9:
            raise ValueError(
                f"mask_token_share={self.mask_token_share} and "
                f"random_token_share={self.random_token_share} add up to {total:g}; "
                "lower one so that they reach at most 1"
            )
        return self

    @model_validator(mode="after")
    def _schedule_is_read(self) -> MlmObjective:
        schedule, step_at = self.masking_rate_schedule, self.masking_rate_step_at
        if schedule != "linear" and self.masking_rate_final is None:
            raise ValueError(
                f"masking_rate_schedule={schedule} leads from masking_rate to masking_rate_final, "
                "which is null; set masking_rate_final, or leave masking_rate_schedule out"
            )
        if step_at != 0.5 and schedule != "step":
            raise ValueError(
                f"masking_rate_step_at={step_at:g} is read with masking_rate_schedule=step only, "
                f"which is {schedule}; set masking_rate_schedule=step or leave "
                "masking_rate_step_at out"
            )
        return self

    def masking_rate_at(self, progress: float) -> float:
        """Return the rate in a step before which a share ``progress`` of the run is done. Pure."""
        first, last = self.masking_rate, self.masking_rate_final
        if last is None:
            return first
        if self.masking_rate_schedule == "step":
            return first if progress < self.masking_rate_step_at else last
        done = min(1.0, max(0.0, progress))
        if self.masking_rate_schedule == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return first + (last - first) * done

    @property
    def largest_masked_share(self) -> float:
        return max(self.masking_rate, self.masking_rate_final or 0.0)

    @property
    def mean_masked_share(self) -> float:
        first, last = self.masking_rate, self.masking_rate_final
        if last is None:
            return first
        at_first = self.masking_rate_step_at if self.masking_rate_schedule == "step" else 0.5
        return first * at_first + last * (1.0 - at_first)

    def as_evaluated(self) -> MlmObjective:
        """Return the objective by which held-out samples are masked, whatever the step. Pure."""
        rate = self.eval_masking_rate or self.masking_rate
        constant = {"masking_rate_final": None, "masking_rate_schedule": "linear"}
        return self.model_copy(update={"masking_rate": rate, **constant})


class DiffusionObjective(MaskedFields):
    """Masked diffusion: each sample is masked at a rate of its own, from hardly any token to all.

    What is minimised bounds the negative log-likelihood of the text, so that such a model can
    generate it, token by token in any order (LLaDA, arXiv 2502.09992).
    """

    kind: Literal["diffusion"]
    least_masking_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Where the rates of samples begin, which are spread evenly from there to 1; a masked token
    weighs 1 / rate, and so at most the inverse of this."""
    prompts: Strings = ()
    """Texts that the trained model continues when the run ends, or whose <mask> it fills."""

    @property
    def largest_masked_share(self) -> float:
        return 1.0

    @property
    def mean_masked_share(self) -> float:
        return (1.0 + self.least_masking_rate) / 2

    def masking_rate_of(self, place: float) -> float:
        """Return the rate at a place in [0, 1) among all of them. Pure."""
        return 1.0 - (1.0 - self.least_masking_rate) * place


class ClmObjective(LossFields):
    """Causal language modelling: predict the next token."""

    kind: Literal["clm"]
    prompts: Strings = ()
    """Texts that the trained model continues when the run ends."""


class SpanCorruptionObjective(LossFields):
    """Span corruption: an encoder reads a text with spans taken out, a decoder writes the spans.

    As T5 is pretrained (arXiv 1910.10683). data.sequence_length is what the encoder reads.
    """

    is_encoder_decoder: ClassVar[bool] = True

    kind: Literal["span_corruption"]
    noise_density: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are taken away and predicted."""
    mean_span_length: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    """Tokens that a span has on average."""
    prompts: Strings = ()
    """Texts with <extra_id_0>, <extra_id_1> and so on, for each of which the trained model writes
    a span when the run ends."""

    @model_validator(mode="after")
    def _spans_are_apart(self) -> SpanCorruptionObjective:
        if self.noise_density / self.mean_span_length > 1 - self.noise_density:
            raise ValueError(
                f"noise_density={self.noise_density:g} with mean_span_length="
                f"{self.mean_span_length:g} leaves fewer tokens than there are spans to be kept "
                "apart by them; lower the density or lengthen the spans"
            )
        return self

    def counts(self, sequence_length: int) -> SpanCounts:
        """Return what a sample is made of whose inputs have that many tokens. Pure."""
        return counts_of_inputs(sequence_length, self.noise_density, self.mean_span_length)

    def positions(self, sequence_length: int) -> int:
        return sequence_length + self.counts(sequence_length).targets


ObjectiveConfig = Annotated[
    MlmObjective | ClmObjective | DiffusionObjective | SpanCorruptionObjective,
    Field(discriminator="kind"),
]
