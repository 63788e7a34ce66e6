"""Small models of each architecture that can be told of documents, and some documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from shardwright.train.config import documents
from shardwright.train.config.positions import POSITIONS_START_AFTER_PADDING
from shardwright.train.model.document_attention import PREFIX
from shardwright.train.model.documents import DocumentBounds

LENGTHS = (7, 1, 33, 7, 8, 40)
"""In tokens: rows of 48, the third and the last longer than ModernBERT's window below."""
SHAPE = (2, 48)
VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "initializer_range": 0.3,  # so that what is attended to makes a difference
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "tie_word_embeddings": False,
}
OF_KIND: dict[str, dict[str, Any]] = {
    "modernbert": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "local_attention": 8,
    },
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "electra": {"embedding_size": 32},
}
CAUSAL = ("gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")


def model_of(kind: str) -> PreTrainedModel:
    """Return a small model with transformers' own attention, in training mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **OF_KIND.get(kind, {})})
    auto: Any = AutoModelForCausalLM if kind in CAUSAL else AutoModelForMaskedLM
    model: PreTrainedModel = auto.from_config(config, attn_implementation="sdpa")
    model.config.use_cache = False
    return model.train()


def bounds(kind: str, form: Any, **settings: Any) -> DocumentBounds:
    first = SIZES["pad_token_id"] + 1 if kind in POSITIONS_START_AFTER_PADDING else 0
    return DocumentBounds(form, longest=48, first_position=first, **settings)


def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(4, VOCABULARY, SHAPE)


def outcome(
    model: PreTrainedModel, forward: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits (tokens, vocabulary) and the gradients of a loss of each of them."""
    model.zero_grad()
    logits = forward()
    labels = torch.arange(len(logits)) % VOCABULARY
    cross_entropy(logits, labels, reduction="sum").backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), named


def told(
    model: PreTrainedModel, kernel: documents.Kernel, tells: DocumentBounds
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.config._attn_implementation = PREFIX + kernel
    arguments = tells.of(np.array(LENGTHS), SHAPE)
    return outcome(model, lambda: model(tokens(), **arguments).logits.flatten(0, 1))


def alone(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what transformers' own attention makes of each document by itself."""
    model.config._attn_implementation = "sdpa"
    each = tokens().flatten().split(LENGTHS)
    return outcome(model, lambda: torch.cat([model(ids[None]).logits[0] for ids in each]))
