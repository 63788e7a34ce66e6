"""A loss of the user's own in place of the cross entropy: what it is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwright.train.config.objective import LossFields
from shardwright.train.model.loss_terms import IGNORED
from shardwright.train.own_parts import Part, load, part, said

KEY = "objective.loss"


class OwnLoss:
    """Calls the user's function with the positions that have a label, and adds up what it gives.

    ``logits`` (positions, vocabulary) in fp32, ``labels`` (positions,) of token ids: the function
    returns the loss of each position, (positions,), so that neither accumulation nor the number of
    ranks changes what a label weighs.
    """

    def __init__(self, text: str) -> None:
        self._part: Part = part(KEY, text)
        self._function: Callable[[Tensor, Tensor], Any] = load(KEY, text)

    @classmethod
    def of(cls, objective: LossFields) -> OwnLoss | None:
        """Return what an objective names; None where that is the cross entropy.

        Raises UserError where it cannot be imported.
        """
        return None if objective.loss is None else cls(objective.loss)

    def summed(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the sum over the labels, in fp32.

        ``labels`` are `IGNORED` where there is none. With ``weights`` (positions,) each counts by
        its own. Raises UserError where the function gives something else than it has to.
        """
        logits, labels = logits.flatten(0, -2), labels.flatten().to(logits.device)
        kept = labels.ne(IGNORED)
        logits, labels = logits[kept].float(), labels[kept]
        try:
            found = self._function(logits, labels)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever code of the user's raises
            raise RuntimeError(f"{KEY}={self._part} failed: {said(error)}") from error
        if not isinstance(found, Tensor) or found.shape != labels.shape:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise self._part.wrong(
                f"it returned {given} for labels of shape {tuple(labels.shape)}; it is to return "
                "the loss of each position, a tensor of the labels' shape"
            )
        if not found.is_floating_point():
            raise self._part.wrong(f"it returned {found.dtype}; a loss is a floating-point number")
        if logits.requires_grad and not found.requires_grad:
            raise self._part.wrong(
                "what it returned has no gradient with respect to the logits; compute it by "
                "operations of torch, without detach and no_grad"
            )
        found = found.float()
        return found.sum() if weights is None else (found * weights.flatten()[kept]).sum()

    def tried(self) -> None:
        """Raise UserError where a few random logits have no loss, or no gradient."""
        random = torch.Generator().manual_seed(0)
        logits = torch.randn(5, 11, generator=random).requires_grad_()
        labels = torch.tensor([3, IGNORED, 0, 10, 7])
        try:
            loss = self.summed(logits, labels)
        except RuntimeError as error:
            raise self._part.wrong(str(error).partition(" failed: ")[2] or str(error)) from error
        loss.backward()
