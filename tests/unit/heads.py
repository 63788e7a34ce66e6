"""Small models of the kinds that differ in what is around their output embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
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

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
DISTIL = DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
Models = dict[str, Callable[[], PreTrainedModel]]

MASKED: Models = {
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "roberta, untied": lambda: RobertaForMaskedLM(
        RobertaConfig(**SIZES, tie_word_embeddings=False)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, pad_token_id=0)),
    "distilbert": lambda: DistilBertForMaskedLM(DISTIL),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(**SIZES)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES)),
}
CAUSAL: Models = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
}


def ids_and_labels(ignored: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels (batch, sequence), a share of which is to be predicted."""
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (3, 16))
    labels = torch.where(torch.rand(3, 16) < share, ids, ignored)
    labels[1] = ignored  # a short sample may have none
    return ids, labels
