"""By a GPU's kernels a document is what it is where attention is written down; by a CPU's, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device

from shardwright.train.config import documents
from shardwright.train.model.document_attention import PREFIX
from tests.documents import LENGTHS, SHAPE, bounds, model_of, outcome, tokens

ON_GPU = [
    pytest.param("cuda", "varlen", marks=pytest.mark.gpu),
    pytest.param("cuda", "sdpa", marks=pytest.mark.gpu),
]


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


def in_16_bits(kind: str, device: torch.device, kernel: documents.Kernel) -> Outcome:
    """Return logits and gradients of a model of bf16."""
    model: Any = model_of(kind)
    model.to(device, torch.bfloat16)
    model.config._attn_implementation = PREFIX + kernel
    form = {"varlen": "bounds", "sdpa": "slots", "eager": "numbers"}[kernel]
    told = bounds(kind, form).of(np.array(LENGTHS), SHAPE)
    arguments = send_to_device(told, device)
    ids = tokens().to(device)
    return outcome(model, lambda: model(ids, **arguments).logits.flatten(0, 1).float())


@pytest.mark.parametrize(("device", "kernel"), [*ON_GPU, ("cpu", "sdpa")])
@pytest.mark.parametrize("kind", ["roberta", "modernbert", "gpt2", "llama"])
def test_kernels_agree_in_16_bits(kind: str, device: str, kernel: documents.Kernel) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine shows no GPU")
    logits, gradients = in_16_bits(kind, torch.device(device), kernel)
    expected, of_each = in_16_bits(kind, torch.device(device), "eager")
    # bf16 has 8 bits of mantissa, and three blocks add up their rounding.
    assert (logits - expected).norm() < 0.03 * expected.norm()
    # That of a key's bias is 0 but for rounding.
    least = 0.01 * max(float(gradient.norm()) for gradient in of_each.values())
    for parameter, gradient in of_each.items():
        assert (gradients[parameter] - gradient).norm() < 0.1 * gradient.norm() + least, parameter
