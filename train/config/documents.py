"""Which models can be told where documents begin and end, and by which kernel they attend then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Kernel = Literal["sdpa", "varlen", "flash_attention_2", "eager"]

MODELS = frozenset(
    {
        *("bert", "camembert", "electra", "ernie", "modernbert", "roberta", "xlm-roberta"),
        *("gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"),
    }
)
"""Model types of transformers whose position ids are counted from 0 (or from the padding token, as
`POSITIONS_START_AFTER_PADDING` says) and whose attention is the one that is registered for all.
"""

VARLEN_TORCH = (2, 11)
"""First torch whose `torch.nn.attention.varlen` has the scale and the windows that are needed."""
VARLEN_COMPUTE_CAPABILITY = 8.0

_DROPOUTS = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")


def attention_dropout(config_json: Mapping[str, Any]) -> float:
    """Return the dropout on attention weights by a model's config.json. Pure."""
    found = (config_json.get(name) for name in _DROPOUTS)
    return next((float(value) for value in found if isinstance(value, int | float)), 0.0)


def kernel(
    attention: str,
    *,
    on_gpu: bool,
    in_16_bits: bool,
    dropout: float,
    has_varlen: bool,
    has_flash_attn: bool,
) -> Kernel:
    """Return by which kernel a model attends within documents. Pure.

    ``attention`` is model.attention. torch's kernel for rows of several lengths knows no dropout
    (2.13), and so is none for a model that has some.
    """
    if attention == "eager":
        return "eager"
    if attention == "flash_attention_2":
        return "flash_attention_2"
    if attention == "sdpa" or not (on_gpu and in_16_bits):
        return "sdpa"
    if has_varlen and dropout == 0:
        return "varlen"
    return "flash_attention_2" if has_flash_attn else "sdpa"
