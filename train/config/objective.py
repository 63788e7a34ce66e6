"""The section "objective": what the model learns to predict."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shardwright.train.config.section import Fraction, NonNegativeFloat, Section, Strings


class LossFields(Section):
    """What training minimises besides the cross entropy of the labels, and is disturbed by."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a label's probability that all tokens of the vocabulary get alike."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits small (PaLM
    trains with 1e-4)."""
    neftune_noise_alpha: NonNegativeFloat = 0.0
    """Add noise to the input embeddings in training, even in +-alpha / sqrt(length x width) (arXiv
    2310.05914 takes 5 to 15); 0 adds none."""


class MlmObjective(LossFields):
    """Masked language modelling."""

    kind: Literal["mlm"]
    masking_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of tokens to predict."""
    mask_token_share: Fraction = 0.8
    """Of these, replaced by the mask token."""
    random_token_share: Fraction = 0.1
    """Of these, replaced by a random token; the rest stay as they are."""
    whole_word: bool = False
    """Mask all tokens of a word together."""
    head_on_labels_only: bool = True
    """Compute the head where a token is to be predicted alone: the same loss for less work."""
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


class ClmObjective(LossFields):
    """Causal language modelling: predict the next token."""

    kind: Literal["clm"]
    prompts: Strings = ()
    """Texts that the trained model continues when the run ends."""


ObjectiveConfig = Annotated[MlmObjective | ClmObjective, Field(discriminator="kind")]
