"""The section "model": a preset or any architecture from scratch, or pretrained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr

from shardwright.train.config.section import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Strings,
)

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
_OF_ALL = ("auto", "eager")
"""Kinds of attention that every architecture has."""
Quantization = Literal["none", "8bit", "4bit"]
NOT_QUANTIZED = "none"
QUANTIZER = "bitsandbytes"
"""The package that quantises weights."""


class ScratchModel(Section):
    """What every architecture that is initialised from scratch has."""

    options: ClassVar[tuple[str, ...]] = ()
    """The options of conf/model/ that are of this kind, for messages that name one to choose."""
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
    attention: Attention = "auto"
    """auto is sdpa where the architecture has it, else eager; engine.json says which."""

    @property
    def parameters(self) -> int | None:
        """How many parameters the model has; None where that is not known before it is built."""
        matrices = 1 if getattr(self, "tie_word_embeddings", True) else 2
        rest = self.parameters_beside_words
        return None if rest is None else matrices * self.padded_vocab_size * self.hidden_size + rest

    @property
    def parameters_beside_words(self) -> int | None:
        """Those that are in no matrix of the vocabulary's."""
        return None

    @property
    def blocks(self) -> int | None:
        """How many blocks there are, of all stacks; None where the model's own config decides."""
        return self.num_hidden_layers

    def contradictions(self) -> Iterator[str]:
        """Yield a message for each pair of its own values that cannot both be meant."""
        if self.hidden_size % self.num_attention_heads and getattr(self, "head_dim", None) is None:
            yield (
                f"model.hidden_size={self.hidden_size} is not a multiple of "
                f"model.num_attention_heads={self.num_attention_heads}; change one of them"
            )

    @property
    def padded_vocab_size(self) -> int:
        return _padded(self, self.vocab_size)

    @property
    def rows_asked_for(self) -> int | None:
        """Rows of the embedding; None where the model's own config decides."""
        return self.padded_vocab_size

    @property
    def vocabulary(self) -> int | None:
        """Those of them that tokens may use; None where the model's own config decides."""
        return self.vocab_size

    @property
    def imports(self) -> tuple[str, ...]:
        """Modules of the user's own that have to be imported first."""
        return ()

    @property
    def max_sequence_length(self) -> int | None:
        """Longest input in tokens; None where there is no limit, or the weights' config knows."""
        return None

    @property
    def causal(self) -> bool | None:
        """Whether the architecture predicts the next token; None where it is not known yet."""
        return False

    @property
    def is_encoder_decoder(self) -> bool | None:
        """Whether it has a stack that reads and one that writes; None where it is not known yet."""
        return False

    @property
    def trusts_code(self) -> bool:
        """Whether Python code that comes with the weights may run."""
        return False


class SingleStackModel(ScratchModel):
    """What an encoder or a decoder by itself has besides."""

    max_position_embeddings: PositiveInt
    """Longest sequence in tokens (RoBERTa spends two of these on its padding offset)."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = True
    """The head shares the embedding's weights."""

    @property
    def max_sequence_length(self) -> int | None:
        return self.max_position_embeddings


class BertModel(SingleStackModel):
    """BERT, from scratch."""

    options: ClassVar[tuple[str, ...]] = ("bert_base", "bert_large")
    kind: Literal["bert"]
    type_vocab_size: PositiveInt = 2
    """Rows of the embedding of segments; samples are one segment."""
    dropout: Fraction = 0.1
    """On embeddings and residual branches."""
    attention_dropout: Fraction = 0.1
    """On attention weights."""
    layer_norm_epsilon: PositiveFloat = 1e-12
    """Added to the variance in layer norms."""

    @property
    def parameters_beside_words(self) -> int:
        return _of_bert(self, self.type_vocab_size)


class RobertaModel(SingleStackModel):
    """RoBERTa, from scratch."""

    options: ClassVar[tuple[str, ...]] = (
        "roberta_tiny",
        "kantaibert",
        "roberta_base",
        "roberta_large",
    )
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

    @property
    def parameters_beside_words(self) -> int:
        return _of_bert(self, self.type_vocab_size)


def _of_bert(model: SingleStackModel, segments: int) -> int:
    h, i = model.hidden_size, model.intermediate_size
    embeddings = (model.max_position_embeddings + segments + 2) * h
    block = 4 * (h * h + h) + 2 * h * i + i + h + 4 * h
    head = h * h + 3 * h + model.padded_vocab_size
    return embeddings + model.num_hidden_layers * block + head


class ModernBertModel(SingleStackModel):
    """ModernBERT, from scratch."""

    options: ClassVar[tuple[str, ...]] = ("modernbert_base", "modernbert_large")
    kind: Literal["modernbert"]
    global_attention_every_layers: PositiveInt = 3
    """Every n-th layer attends to the whole sequence, the others to a window."""
    local_attention_window: PositiveInt = 128
    """Window of the local layers in tokens."""
    rope_theta: PositiveFloat = 160000.0
    """Base of the rotary frequencies of layers that attend to the whole sequence."""
    local_rope_theta: PositiveFloat = 10000.0
    """The same of the local layers."""
    dropout: Fraction = 0.0
    """On embeddings and residual branches."""
    attention_dropout: Fraction = 0.0
    """On attention weights."""
    layer_norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in layer norms."""

    @property
    def parameters_beside_words(self) -> int:
        h, i = self.hidden_size, self.intermediate_size
        # The first block has no norm before its attention, the last is followed by one.
        blocks = self.num_hidden_layers * (4 * h * h + 3 * h * i + 2 * h)
        return h + blocks + h * h + h + self.padded_vocab_size


class Gpt2Model(SingleStackModel):
    """GPT-2, from scratch."""

    options: ClassVar[tuple[str, ...]] = (
        "gpt2_tiny",
        "gpt2_small",
        "gpt2_medium",
        "gpt2_large",
        "gpt2_xl",
    )
    kind: Literal["gpt2"]
    dropout: Fraction = 0.1
    """On embeddings and residual branches."""
    attention_dropout: Fraction = 0.1
    """On attention weights."""
    layer_norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in layer norms."""
    fused_gelu: bool = True
    """Compute GELU by one kernel (gelu_pytorch_tanh in config.json) instead of eight (gelu_new):
    the same function, to rounding."""

    @property
    def causal(self) -> bool:
        return True

    @property
    def parameters_beside_words(self) -> int:
        h, i = self.hidden_size, self.intermediate_size
        block = 4 * (h * h + h) + 2 * h * i + i + h + 4 * h
        return self.max_position_embeddings * h + self.num_hidden_layers * block + 2 * h


class LlamaModel(SingleStackModel):
    """Llama, from scratch."""

    options: ClassVar[tuple[str, ...]] = (
        "llama_tiny",
        "llama_150m",
        "llama_1b",
        "llama_3b",
        "llama_8b",
        "llama_70b",
    )
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

    @property
    def parameters_beside_words(self) -> int:
        h, i = self.hidden_size, self.intermediate_size
        size = self.head_dim or h // self.num_attention_heads
        attention = 2 * h * size * (self.num_attention_heads + self.num_key_value_heads)
        return self.num_hidden_layers * (attention + 3 * h * i + 2 * h) + h

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}; change one of them"
            )


class T5Model(ScratchModel):
    """T5, from scratch: an encoder and a decoder. Its head shares the embedding's weights."""

    options: ClassVar[tuple[str, ...]] = ("t5_tiny", "t5_small", "t5_base", "t5_large")
    kind: Literal["t5"]
    num_hidden_layers: PositiveInt
    """Transformer blocks of the encoder, and as many of the decoder."""
    head_dim: PositiveInt | None = None
    """Size of one head; null is hidden_size / num_attention_heads."""
    feed_forward: Literal["relu", "gated_gelu"] = "relu"
    """Activation of the MLP, of T5 and of its version 1.1."""
    relative_attention_buckets: PositiveInt = 32
    """Distances between tokens that attention tells apart."""
    relative_attention_max_distance: PositiveInt = 128
    """Distance in tokens from which on all are one."""
    initializer_factor: PositiveFloat = 1.0
    """By what the standard deviations of the initial weights, T5's own, are multiplied."""
    dropout: Fraction = 0.1
    """On embeddings, residual branches and attention weights."""
    layer_norm_epsilon: PositiveFloat = 1e-6
    """Added to the mean square in norms."""
    fused_gelu: bool = True
    """Compute GELU by one kernel instead of eight: the same function, to rounding."""

    @property
    def is_encoder_decoder(self) -> bool:
        return True

    @property
    def blocks(self) -> int:
        return 2 * self.num_hidden_layers

    @property
    def parameters_beside_words(self) -> int:
        h, heads = self.hidden_size, self.num_attention_heads
        attention = 4 * h * heads * (self.head_dim or h // heads) + h
        mlp = (3 if self.feed_forward == "gated_gelu" else 2) * h * self.intermediate_size + h
        # An encoder's block has one attention, a decoder's two; each stack ends with a norm, and
        # has one table of distances.
        blocks = self.num_hidden_layers * (3 * attention + 2 * mlp)
        return blocks + 2 * (h + self.relative_attention_buckets * heads)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.attention == "flash_attention_2":
            yield (
                "model.attention=flash_attention_2 knows no bias of positions, which "
                f"model.kind={self.kind} adds to attention; set model.attention=auto"
            )


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class NamedModel(Section):
    """What a model has that brings a config of its own, by a name or a path."""

    options: ClassVar[tuple[str, ...]] = ()
    """The options of conf/model/ that are of this kind, for messages that name one to choose."""
    decided_elsewhere: ClassVar[Mapping[str, str]] = {
        "architectures": "objective",
        "auto_map": "model.name and model.trust_remote_code",
        "attn_implementation": "model.attention",
        "bos_token_id": "the tokenizer",
        "cls_token_id": "the tokenizer",
        "decoder_start_token_id": "the tokenizer",
        "dtype": "precision",
        "eos_token_id": "the tokenizer",
        "mask_token_id": "the tokenizer",
        "model_type": "model.name",
        "pad_token_id": "the tokenizer",
        "sep_token_id": "the tokenizer",
        "torch_dtype": "precision",
        "transformers_version": "the installed transformers",
        "use_cache": "the loop, which trains without one",
    }
    """Keys of a config.json that ``overrides`` may not have, and what decides them."""

    name: Annotated[str, Field(min_length=1)]
    """Hub name, model directory, a checkpoint of a run, or its run directory: its final/, or its
    newest checkpoint where it has none. config.yaml then names which, and a resume keeps to it."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is the main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    imports: Annotated[Strings, BeforeValidator(_listed)] = Field(default=(), alias="import")
    """``model.import``: modules of your own, imported by each rank and by whatever loads the model,
    before it is looked for; they register its classes with transformers' Auto classes."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the architecture's own config.json with other values, such as {hidden_act: gelu};
    unknown ones are refused."""
    hidden_size: PositiveInt | None = None
    """Read from the model's own config; sizes that are derived from it are known from then on."""
    attention: Attention = "auto"
    """auto is sdpa where the architecture has it, else eager; engine.json says which."""
    fused_gelu: bool = True
    """Compute GELU by tanh, as GPT-2's gelu_new, by one kernel instead of eight: the same function,
    to rounding. What config.json calls it stays."""
    _parameters: int | None = PrivateAttr(None)

    @property
    def parameters(self) -> int | None:
        return self._parameters

    @property
    def blocks(self) -> int | None:
        """How many blocks there are, of all stacks; None where the model's own config decides."""
        return None

    @property
    def other_positions(self) -> bool:
        """Whether positions are to be told apart otherwise than the model's own config says."""
        return False

    @property
    def changes_its_config(self) -> bool:
        """Whether only the architecture itself can say whether it takes what is asked for."""
        return bool(self.overrides or self.other_positions or self.attention not in _OF_ALL)

    @property
    def rows_asked_for(self) -> int | None:
        """Rows of the embedding; None where the model's own config decides."""
        return None

    @property
    def vocabulary(self) -> int | None:
        """Those of them that tokens may use; None where the model's own config decides."""
        return None

    def found_to_have(self, *, hidden_size: int | None, parameters: int) -> Self:
        """Return it with what only the model itself knows."""
        found = self.model_copy(update={"hidden_size": hidden_size})
        found._parameters = parameters
        return found

    def contradictions(self) -> Iterator[str]:
        for key in self.overrides:
            if (other := self.decided_elsewhere.get(key)) is not None:
                yield f"model.overrides.{key} is decided by {other}; leave it out"
        for module in self.imports:
            if not all(part.isidentifier() for part in module.split(".")):
                yield (
                    f"model.import={module} is not the name of a module, as `import` takes it; "
                    "give one such as my_models, and the directory that holds it in PYTHONPATH"
                )

    @property
    def max_sequence_length(self) -> int | None:
        return None

    @property
    def causal(self) -> bool | None:
        return None

    @property
    def is_encoder_decoder(self) -> bool | None:
        return None

    @property
    def trusts_code(self) -> bool:
        return self.trust_remote_code


class PretrainedModel(NamedModel):
    """Weights to start from: a hub name or a local directory, any MLM or CLM architecture, or a
    T5."""

    options: ClassVar[tuple[str, ...]] = ("pretrained",)
    decided_elsewhere: ClassVar[Mapping[str, str]] = {
        **NamedModel.decided_elsewhere,
        "max_position_embeddings": "model.max_position_embeddings",
        "rope_theta": "model.rope_theta",
        "vocab_size": "the weights, which have a row for each token",
    }
    kind: Literal["pretrained"]
    step: NonNegativeInt | Literal["latest", "best"] | None = None
    """Of a run directory, another checkpoint: of this step, the newest, or the best that is left
    by the checkpoint.best_metric of that run."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary frequencies, of the layers that attend to the whole sequence where others
    have one of their own; null keeps that of the weights. For longer samples: a larger one."""
    local_rope_theta: PositiveFloat | None = None
    """The same of the layers that attend to a window."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence in tokens, of a model with rotary embeddings; null keeps its own."""
    quantization: Quantization = "none"
    """How linear layers but the head are held beside an adapter: 8bit is LLM.int8(), 4bit is NF4 in
    blocks of 64 (QLoRA). Checkpoints then hold what is trained alone, and need ``name`` again."""

    @property
    def other_positions(self) -> bool:
        changed = (self.rope_theta, self.local_rope_theta, self.max_position_embeddings)
        return any(value is not None for value in changed)

    @property
    def max_sequence_length(self) -> int | None:
        return self.max_position_embeddings


class ConfigModel(NamedModel):
    """Any architecture of transformers, or of your own, from scratch: by its config.json alone."""

    options: ClassVar[tuple[str, ...]] = ("from_config",)
    decided_elsewhere: ClassVar[Mapping[str, str]] = {
        **NamedModel.decided_elsewhere,
        "vocab_size": "model.vocab_size",
    }
    kind: Literal["from_config"]
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; at least the tokenizer's vocabulary. null is that of the config."""
    pad_vocab_to_multiple: PositiveInt | None = None
    """Round ``vocab_size`` up to a multiple of this (64 suits tensor cores); null never pads."""

    @property
    def rows_asked_for(self) -> int | None:
        return None if self.vocab_size is None else _padded(self, self.vocab_size)

    @property
    def vocabulary(self) -> int | None:
        return self.vocab_size

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.vocab_size is None and self.pad_vocab_to_multiple is not None:
            yield (
                f"model.pad_vocab_to_multiple={self.pad_vocab_to_multiple} rounds "
                "model.vocab_size up, which is not known here by the model's config.json; set "
                "model.vocab_size too"
            )


def quantization_of(model: Section) -> str:
    """Return in how many bits a model's frozen weights are to be held, or none. Pure."""
    return getattr(model, "quantization", NOT_QUANTIZED)


def _padded(model: ScratchModel | ConfigModel, rows: int) -> int:
    multiple = model.pad_vocab_to_multiple or 1
    return -(-rows // multiple) * multiple


ModelConfig = Annotated[
    BertModel
    | RobertaModel
    | ModernBertModel
    | Gpt2Model
    | LlamaModel
    | T5Model
    | PretrainedModel
    | ConfigModel,
    Field(discriminator="kind"),
]
