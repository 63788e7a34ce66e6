"""GELU by tanh in one kernel, which transformers computes in eight under older names."""

from __future__ import annotations

from torch import nn
from transformers.activations import (
    AccurateGELUActivation,
    FastGELUActivation,
    GELUTanh,
    NewGELUActivation,
)

_UNFUSED = (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)
"""gelu_new, gelu_fast and gelu_accurate: one function, written three ways in products and powers,
each of which keeps for its gradient what it takes."""


def fuse(model: nn.Module) -> None:
    """Have each such activation computed by torch's own kernel, in place.

    The function is the same; in bf16 it is rounded once, not after each of eight operations.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _UNFUSED):
                setattr(module, name, GELUTanh())


def unfused(model: nn.Module) -> int:
    """Return how many modules of a live model are such an activation."""
    return sum(isinstance(module, _UNFUSED) for module in model.modules())
