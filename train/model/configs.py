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
)

from shardwright.train.config.model import (
    BertModel,
    Gpt2Model,
    LlamaModel,
    ModelConfig,
    ModernBertModel,
    PretrainedModel,
    RobertaModel,
    ScratchModel,
)
from shardwright.train.config.positions import GLOBAL, LOCAL
from shardwright.train.errors import UserError
from shardwright.train.model.pretrained import attention_of, pretrained_config

MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "bert": BertForMaskedLM,
    "roberta": RobertaForMaskedLM,
    "modernbert": ModernBertForMaskedLM,
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
}


def transformers_config(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, kept: Path | None = None
) -> PreTrainedConfig:
    """Map a model section to transformers' config; special token ids come from the tokenizer.

    A pretrained model keeps its own config, read in ``kept`` where there is that. Raises UserError
    where that cannot be read, or where RoBERTa gets a tokenizer without a padding token.
    """
    match model:
        case PretrainedModel():
            return pretrained_config(model, kept)
        case BertModel() | RobertaModel():
            if isinstance(model, RobertaModel) and tokenizer.pad_token_id is None:
                raise UserError(
                    "model.kind=roberta counts positions from its padding token, and the tokenizer "
                    "has none; choose another tokenizer or another model"
                )
            encoder_class = BertConfig if isinstance(model, BertModel) else RobertaConfig
            config: PreTrainedConfig = encoder_class(
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
            shared = _shared(model, tokenizer)
            config = GPT2Config(
                n_inner=shared.pop("intermediate_size"),
                resid_pdrop=model.dropout,
                embd_pdrop=model.dropout,
                attn_pdrop=model.attention_dropout,
                layer_norm_epsilon=model.layer_norm_epsilon,
                activation_function="gelu_pytorch_tanh" if model.fused_gelu else "gelu_new",
                **shared,
            )
        case LlamaModel():
            shared = _shared(model, tokenizer)
            # The padding row of the embedding gets no gradient, so a token that means something
            # must not stand in for padding.
            if shared["pad_token_id"] in (shared["bos_token_id"], shared["eos_token_id"]):
                shared["pad_token_id"] = None
            config = LlamaConfig(
                num_key_value_heads=model.num_key_value_heads,
                head_dim=model.head_dim,
                rope_parameters=_unscaled(model.rope_theta),
                rms_norm_eps=model.rms_norm_epsilon,
                attention_dropout=model.attention_dropout,
                **shared,
            )
    return config


def _of_modernbert(
    model: ModernBertModel,
) -> dict[Literal["full_attention", "sliding_attention"], dict[str, Any]]:
    return {GLOBAL: _unscaled(model.rope_theta), LOCAL: _unscaled(model.local_rope_theta)}


def _unscaled(rope_theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": rope_theta}


def _shared(model: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
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
