"""From a size preset to transformers' own config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from shardwright.train.config.model import (
    BertModel,
    ConfigModel,
    Gpt2Model,
    LlamaModel,
    ModelConfig,
    ModernBertModel,
    PretrainedModel,
    RobertaModel,
    SingleStackModel,
    T5Model,
)
from shardwright.train.config.positions import GLOBAL, LOCAL, POSITIONS_START_AFTER_PADDING
from shardwright.train.errors import UserError
from shardwright.train.model.pretrained import attention_of, named_config

MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "bert": BertForMaskedLM,
    "roberta": RobertaForMaskedLM,
    "modernbert": ModernBertForMaskedLM,
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
    "t5": T5ForConditionalGeneration,
}


def transformers_config(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, kept: Path | None = None
) -> PreTrainedConfig:
    """Map a model section to transformers' config; special token ids come from the tokenizer.

    A model by name has its own config, read in ``kept`` where there is that; from scratch it takes
    vocabulary and special tokens from the run. Raises UserError where that cannot be read, or where
    RoBERTa gets a tokenizer without a padding token.
    """
    config: PreTrainedConfig
    match model:
        case PretrainedModel():
            return named_config(model, kept)
        case ConfigModel():
            config = named_config(model, kept)
            _follow_the_run(config, model, tokenizer)
        case BertModel() | RobertaModel():
            if isinstance(model, RobertaModel) and tokenizer.pad_token_id is None:
                raise UserError(
                    "model.kind=roberta counts positions from its padding token, and the tokenizer "
                    "has none; choose another tokenizer or another model"
                )
            encoder_class = BertConfig if isinstance(model, BertModel) else RobertaConfig
            config = encoder_class(
                type_vocab_size=model.type_vocab_size,
                hidden_dropout_prob=model.dropout,
                attention_probs_dropout_prob=model.attention_dropout,
                layer_norm_eps=model.layer_norm_epsilon,
                **_shared(model, tokenizer),
            )
        case ModernBertModel():
            config = ModernBertConfig(
                layer_types=[
                    "sliding_attention"
                    if layer % model.global_attention_every_layers
                    else "full_attention"
                    for layer in range(model.num_hidden_layers)
                ],
                local_attention=model.local_attention_window,
                rope_parameters=_of_modernbert(model),
                embedding_dropout=model.dropout,
                mlp_dropout=model.dropout,
                attention_dropout=model.attention_dropout,
                norm_eps=model.layer_norm_epsilon,
                cls_token_id=tokenizer.cls_token_id,
                sep_token_id=tokenizer.sep_token_id,
                **_shared(model, tokenizer),
            )
        case Gpt2Model():
            config = _of_gpt2(model, tokenizer)
        case LlamaModel():
            shared = _shared(model, tokenizer) | {"pad_token_id": _padding(tokenizer)}
            config = LlamaConfig(
                num_key_value_heads=model.num_key_value_heads,
                head_dim=model.head_dim,
                rope_parameters=_unscaled(model.rope_theta),
                rms_norm_eps=model.rms_norm_epsilon,
                attention_dropout=model.attention_dropout,
                **shared,
            )
        case T5Model():
            config = _of_t5(model, tokenizer)
    return config


def _of_gpt2(model: Gpt2Model, tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
    shared = _shared(model, tokenizer)
    return GPT2Config(
        n_inner=shared.pop("intermediate_size"),
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.attention_dropout,
        layer_norm_epsilon=model.layer_norm_epsilon,
        activation_function="gelu_pytorch_tanh" if model.fused_gelu else "gelu_new",
        **shared,
    )


def _of_t5(model: T5Model, tokenizer: PreTrainedTokenizerBase) -> T5Config:
    """Return a T5's config; its head is tied, as transformers (5.23) ties that of each T5."""
    of_any_config: dict[str, Any] = {
        "attn_implementation": attention_of(model),
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    return T5Config(
        vocab_size=model.padded_vocab_size,
        d_model=model.hidden_size,
        d_kv=model.head_dim or model.hidden_size // model.num_attention_heads,
        d_ff=model.intermediate_size,
        num_layers=model.num_hidden_layers,
        num_heads=model.num_attention_heads,
        relative_attention_num_buckets=model.relative_attention_buckets,
        relative_attention_max_distance=model.relative_attention_max_distance,
        dropout_rate=model.dropout,
        layer_norm_epsilon=model.layer_norm_epsilon,
        initializer_factor=model.initializer_factor,
        feed_forward_proj=model.feed_forward.replace("_", "-"),
        dtype=torch.float32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **of_any_config,
    )


def _follow_the_run(
    config: PreTrainedConfig, model: ConfigModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Give a config that was made elsewhere the run's vocabulary and dtype. Raises UserError."""
    text = config.get_text_config()
    if text.model_type in POSITIONS_START_AFTER_PADDING and tokenizer.pad_token_id is None:
        raise UserError(
            f"model.name={model.name} ({text.model_type}) counts positions from its padding token, "
            "and the tokenizer has none; choose another tokenizer or another model"
        )
    if model.rows_asked_for is not None:
        text.vocab_size = model.rows_asked_for
    text.bos_token_id = tokenizer.bos_token_id
    text.eos_token_id = tokenizer.eos_token_id
    text.pad_token_id = _padding(tokenizer)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = tokenizer.pad_token_id
    for name in ("mask_token_id", "cls_token_id", "sep_token_id"):
        if hasattr(text, name):
            setattr(text, name, getattr(tokenizer, name))
    config.dtype = torch.float32
    # Of the weights that were published with it, and none of these are.
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _padding(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the padding's id; None where that token means something else too.

    The padding's row of an embedding gets no gradient, as it would then.
    """
    pad: int | None = tokenizer.pad_token_id
    return None if pad in (tokenizer.bos_token_id, tokenizer.eos_token_id) else pad


def _of_modernbert(
    model: ModernBertModel,
) -> dict[Literal["full_attention", "sliding_attention"], dict[str, Any]]:
    return {GLOBAL: _unscaled(model.rope_theta), LOCAL: _unscaled(model.local_rope_theta)}


def _unscaled(rope_theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": rope_theta}


def _shared(model: SingleStackModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what transformers calls by one name in every architecture."""
    shared: dict[str, Any] = {
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attn_implementation": attention_of(model),
        "dtype": torch.float32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not model.causal:
        shared["mask_token_id"] = tokenizer.mask_token_id
    return shared
