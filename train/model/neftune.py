"""Noise on a model's input embeddings while it trains (NEFTune, arXiv 2310.05914).

transformers' own (5.23, integrations/neftune.py) takes a row for a sample: where samples lie end to
end in one, its noise would be as much smaller as there are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ALPHA = "_neftune_noise_alpha"


def enable(model: PreTrainedModel, alpha: float, sample_length: int | None) -> None:
    """Have training passes, and no others, add even noise in +-alpha / sqrt(length x width).

    It is drawn from the rank's own random numbers, as dropout is. ``sample_length`` is that of the
    samples where several lie end to end in a row, None where each row is one.
    """
    embedding: Any = model.get_input_embeddings()

    def disturb(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        length = output.shape[-2] if sample_length is None else sample_length
        most = alpha / math.sqrt(length * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-most, most)

    embedding.register_forward_hook(disturb)
    setattr(embedding, _ALPHA, alpha)


def read_back(model: Any) -> float:
    """Return the alpha of a live model's noise, 0 where there is none."""
    embedding = model.get_input_embeddings()
    hooks = [hook for hook in embedding._forward_hooks.values() if hook.__module__ == __name__]
    return float(getattr(embedding, _ALPHA, 0.0)) if hooks else 0.0
