"""Tiny models and their tokenizer, as directories."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
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
