"""The section "model": an architecture from scratch, or pretrained weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from train.config.section import Fraction, PositiveFloat, PositiveInt, Section

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


class ScratchModel(Section):
    """What every architecture that is initialised from scratch has."""

    vocab_size: PositiveInt
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    pad_vocab_to_multiple: PositiveInt | None = None
    """Round ``vocab_size`` up to a multiple of this (64 suits tensor cores); null never pads."""
    hidden_size: PositiveInt
    """Width of what passes from block to block."""
    num_hidden_layers: PositiveInt
    """Transformer blocks."""
    num_attention_heads: PositiveInt
    """Attention heads of each block."""
    intermediate_size: PositiveInt
    """Width of the MLP."""
    max_position_embeddings: PositiveInt
    """Longest sequence in tokens (RoBERTa spends two of these on its padding offset)."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = True
    """The head shares the embedding's weights."""
    attention: Attention = "auto"
    """auto is sdpa where the architecture has it, else eager; engine.json says which."""

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_to_multiple or 1
        return -(-self.vocab_size // multiple) * multiple

    @property
    def max_sequence_length(self) -> int | None:
        """Longest input in tokens, or None where only the weights' own config knows."""
        return self.max_position_embeddings

    @property
    def causal(self) -> bool | None:
        """Whether the architecture predicts the next token; None where it is not known yet."""
        return False

    @property
    def trusts_code(self) -> bool:
        """Whether Python code that comes with the weights may run."""
        return False


class BertModel(ScratchModel):
    """BERT, from scratch."""

    kind: Literal["bert"]
    type_vocab_size: PositiveInt = 2
    """Rows of the embedding of segments; samples are one segment."""
    dropout: Fraction = 0.1
    """On embeddings and residual branches."""
    attention_dropout: Fraction = 0.1
    """On attention weights."""
    layer_norm_epsilon: PositiveFloat = 1e-12
    """Added to the variance in layer norms."""


class RobertaModel(ScratchModel):
    """RoBERTa, from scratch."""

    kind: Literal["roberta"]
    type_vocab_size: PositiveInt = 1
    """Rows of the embedding of segments; samples are one segment."""
    dropout: Fraction = 0.1
    """On embeddings and residual branches."""
    attention_dropout: Fraction = 0.1
    """On attention weights."""
    layer_norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in layer norms."""

    @property
    def max_sequence_length(self) -> int:
        # Positions start at padding_idx + 1 = 2.
        return self.max_position_embeddings - 2


class ModernBertModel(ScratchModel):
    """ModernBERT, from scratch."""

    kind: Literal["modernbert"]
    global_attention_every_layers: PositiveInt = 3
    """Every n-th layer attends to the whole sequence, the others to a window."""
    local_attention_window: PositiveInt = 128
    """Window of the local layers in tokens."""
    dropout: Fraction = 0.0
    """On embeddings and residual branches."""
    attention_dropout: Fraction = 0.0
    """On attention weights."""
    layer_norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in layer norms."""


class Gpt2Model(ScratchModel):
    """GPT-2, from scratch."""

    kind: Literal["gpt2"]
    dropout: Fraction = 0.1
    """On embeddings and residual branches."""
    attention_dropout: Fraction = 0.1
    """On attention weights."""
    layer_norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in layer norms."""

    @property
    def causal(self) -> bool:
        return True


class LlamaModel(ScratchModel):
    """Llama, from scratch."""

    kind: Literal["llama"]
    num_key_value_heads: PositiveInt
    """Heads of keys and values; fewer than ``num_attention_heads`` is grouped-query attention."""
    head_dim: PositiveInt | None = None
    """Size of one head; null is hidden_size / num_attention_heads."""
    rope_theta: PositiveFloat = 500000.0
    """Base of the rotary frequencies."""
    rms_norm_epsilon: PositiveFloat = 1e-5
    """Added to the mean square in norms."""
    attention_dropout: Fraction = 0.0
    """On attention weights."""

    @property
    def causal(self) -> bool:
        return True


class PretrainedModel(Section):
    """Weights to go on from: a hub name or a local directory, any MLM or CLM architecture."""

    kind: Literal["pretrained"]
    name: Annotated[str, Field(min_length=1)]
    """Hub name, model directory, or run directory for its final/."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is the main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights."""
    hidden_size: PositiveInt | None = None
    """The weights' own, which is found: what is derived from it is known once it is."""
    attention: Attention = "auto"
    """auto is sdpa where the architecture has it, else eager; engine.json says which."""

    @property
    def max_sequence_length(self) -> int | None:
        return None

    @property
    def causal(self) -> bool | None:
        return None

    @property
    def trusts_code(self) -> bool:
        return self.trust_remote_code


ModelConfig = Annotated[
    BertModel | RobertaModel | ModernBertModel | Gpt2Model | LlamaModel | PretrainedModel,
    Field(discriminator="kind"),
]
