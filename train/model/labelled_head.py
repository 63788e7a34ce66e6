"""A masked model's head where a token is to be predicted alone: the same loss for less work.

About one position in seven has a label, and the head is the largest matrix of a small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shardwright.train.errors import UserError


class LabelledHead:
    """Has a model's head see some positions of a batch instead of all of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._positions: torch.Tensor | None = None
        for module in _around_head(model):
            module.register_forward_pre_hook(self._select)

    @contextmanager
    def at(self, positions: torch.Tensor) -> Iterator[None]:
        """Let the logits of forward passes in the block be those of ``positions`` alone.

        ``positions`` are indices into the flattened (batch, sequence), on the model's device;
        logits come to have the shape (positions, vocabulary).
        """
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def check(self, logits: torch.Tensor, positions: torch.Tensor) -> None:
        """Raise UserError where logits are not those of the positions."""
        if logits.shape[:-1] != positions.shape:
            raise UserError(
                f"this model's head gives logits of shape {tuple(logits.shape)} for "
                f"{len(positions)} positions: it cannot be computed where there are labels alone; "
                "set objective.head_on_labels_only=false"
            )

    def _select(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # The outermost module of the head has the whole batch, those within what it has left.
        if self._positions is None or not arguments or arguments[0].dim() != 3:
            return None
        hidden = arguments[0].flatten(0, 1).index_select(0, self._positions)
        return (hidden, *arguments[1:])


def positions_of(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """Return where labels (batch, sequence) are to be predicted, as flat indices (labels,)."""
    return labels.flatten().ne(ignored).nonzero().squeeze(1)


def _around_head(model: PreTrainedModel) -> list[nn.Module]:
    """Return the output embedding and what is around it, without the rest of the model."""
    head, body = model.get_output_embeddings(), model.base_model
    if head is None:
        return []
    if body is model:
        return [head]
    within = {module: set(module.modules()) for module in model.modules()}
    return [m for m, inner in within.items() if head in inner and body not in inner]
