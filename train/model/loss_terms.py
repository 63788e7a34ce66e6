"""What is made of the cross entropy of a label: smoothing, the size of the logits, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from shardwright.train.config.objective import LossFields

IGNORED = -100
"""Label of a position that is not predicted."""


@dataclass(frozen=True)
class LossTerms:
    """What is minimised of each label besides; nothing where both are 0."""

    label_smoothing: float = 0.0
    """Share of the label's probability that all tokens get alike, as torch's cross_entropy."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator."""

    @classmethod
    def of(cls, objective: LossFields) -> LossTerms:
        return cls(objective.label_smoothing, objective.z_loss)

    def __bool__(self) -> bool:
        return bool(self.label_smoothing or self.z_loss)


NONE = LossTerms()


class Weighting(NamedTuple):
    """What the labels of a batch count for."""

    weights: Tensor | None = None
    """By which what is minimised of each label is multiplied, of their shape; None is 1 of each."""
    tokens: int | None = None
    """By how many tokens the sum is to be divided; None by as many as there are labels."""


EQUAL = Weighting()


def summed(
    logits: Tensor, labels: Tensor, terms: LossTerms = NONE, weights: Tensor | None = None
) -> Tensor:
    """Return the sum over the labels of what is minimised, in fp32.

    ``logits`` (positions, vocabulary), ``labels`` (positions,), `IGNORED` where there is none.
    With ``weights`` (positions,) each label counts by its own.
    """
    logits = logits.float()
    total = cross_entropy(
        logits,
        labels,
        ignore_index=IGNORED,
        reduction="sum" if weights is None else "none",
        label_smoothing=terms.label_smoothing,
    )
    if weights is not None:
        total = (total * weights).sum()  # of ignored labels it is 0
    if terms.z_loss:
        squares = torch.logsumexp(logits, -1).square()
        if weights is not None:
            squares = squares * weights
        total = total + terms.z_loss * squares.where(labels.ne(IGNORED), 0).sum()
    return total
