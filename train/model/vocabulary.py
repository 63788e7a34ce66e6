"""How many ids a tokenizer has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the highest id plus one: rows that an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1
