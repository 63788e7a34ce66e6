"""A model's forward pass does not ask the device what its rank knows of the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shardwright.train.model import host_checks
from tests.waits import noted

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "use_cache": False,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, pad_token_id=0, use_cache=False)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}
IDS = torch.arange(32).view(2, 16) % 96


@pytest.mark.parametrize("kind", MODELS)
def test_whole_rows_pass_through_a_model_without_a_question(kind: str) -> None:
    model = MODELS[kind]().eval()
    asked: Counter[str] = Counter()
    with noted(asked):
        expected = model(input_ids=IDS).logits
    assert bool(asked) == (kind in ("gpt2", "llama")), "else it is not what this is about"
    host_checks.take_padding_as_known(model)
    asked.clear()
    with noted(asked), host_checks.batches_have_documents(False):
        found = model(input_ids=IDS).logits
    assert asked == {}
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_documents_stay_apart_where_a_batch_has_them(kind: str) -> None:
    model = MODELS[kind]().eval()
    positions = torch.arange(8).repeat(2).expand(2, 16)
    expected = model(input_ids=IDS, position_ids=positions).logits
    with host_checks.batches_have_documents(True):
        found = model(input_ids=IDS, position_ids=positions).logits
    assert torch.equal(found, expected)
    with host_checks.batches_have_documents(False):
        joined = model(input_ids=IDS, position_ids=positions).logits
    assert not torch.allclose(joined, expected, atol=1e-3)
