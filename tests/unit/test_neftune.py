"""Noise on input embeddings: as large as published, in training alone, and drawn by the rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from shardwright.train.model import neftune
from tests.unit.heads import CAUSAL, ids_and_labels

ALPHA = 5.0


@pytest.mark.parametrize("sample_length", [None, 3])
def test_noise_is_even_and_as_large_as_the_length_of_a_sample_says(
    sample_length: int | None,
) -> None:
    model = CAUSAL["gpt2"]()
    ids, _ = ids_and_labels(-100, 0.5)
    embedding: Any = model.get_input_embeddings()
    plain = embedding(ids).detach()
    neftune.enable(model, ALPHA, sample_length)
    model.train()
    torch.manual_seed(3)
    noise = embedding(ids).detach() - plain
    most = ALPHA / math.sqrt((sample_length or ids.shape[1]) * plain.shape[-1])
    assert 0.95 * most < noise.abs().max() <= most + 1e-6
    assert noise.abs().mean() == pytest.approx(most / 2, rel=0.1)
    if sample_length is None:  # and as transformers has it, from the same random numbers
        embedding.neftune_noise_alpha = ALPHA
        torch.manual_seed(3)
        theirs = neftune_post_forward_hook(embedding, (ids,), plain.clone())
        torch.testing.assert_close(noise + plain, theirs)
    model.eval()
    assert torch.equal(embedding(ids), plain)
    assert neftune.read_back(model) == ALPHA


def test_a_model_without_noise_says_so() -> None:
    assert neftune.read_back(CAUSAL["gpt2"]()) == 0
