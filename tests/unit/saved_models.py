"""Tiny models and their tokenizer, as directories."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

POSITIONS = 64


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Write a model with a tokenizer of single bytes."""
    bytes_only = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        model_max_length=POSITIONS,
        **dict(zip(names, SPECIAL, strict=True)),
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def small_llama() -> LlamaForCausalLM:
    """Return a model of two blocks whose values are the same each time; its head is untied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)
