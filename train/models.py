"""From a size preset or a pretrained name to a model with its objective's head, and its weights."""

from __future__ import annotations

import logging
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import is_flash_attn_2_available

from train import activation_checkpointing, fp8
from train.config import (
    BertModel,
    Gpt2Model,
    LlamaModel,
    ModelConfig,
    ModernBertModel,
    ObjectiveConfig,
    PretrainedModel,
    RobertaModel,
    RunConfig,
    ScratchModel,
)
from train.config.positions import usable_positions
from train.data.tokenizer import vocabulary_size
from train.errors import UserError
from train.pretrained import CannotStream, loaded_whole, loading, streamed, weight_files
from train.weights import Values, initialized

logger = logging.getLogger(__name__)

ROUTER_LOGITS = "output_router_logits"
"""The argument of a forward pass by which mixture-of-experts models give their auxiliary loss."""

_OF_AUXILIARY_LOSSES = (
    "router_aux_loss_coef",
    "aux_loss_coef",
    "aux_loss_alpha",
    "router_z_loss_coef",
    "z_loss_coefficient",
)
"""What configs call the weight of a loss beside that of the labels."""

_MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "bert": BertForMaskedLM,
    "roberta": RobertaForMaskedLM,
    "modernbert": ModernBertForMaskedLM,
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
}


def build(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    kept: Path | None = None,
    *,
    reads_weights: bool = True,
) -> tuple[PreTrainedModel, Values]:
    """Return the run's model, in training mode and without values, and its parameters' fp32 values.

    A pretrained model's config, generation settings and code are those in ``kept``, or with the
    weights where there is none. Where a run is resumed its weights need not be read, and the values
    are without meaning then.

    The parameters are on the meta device: `Engine.shard` gives each rank its part of them. From
    scratch, the values are a function of the config and ``config.seed`` alone; pretrained ones are
    read tensor by tensor, where that is possible. The model compiles and recomputes if asked for.

    Raises UserError where the tokenizer or the samples do not fit the model, a pretrained model
    cannot be loaded, has no head for the objective or does not give the auxiliary loss that its
    config asks for, or flash attention is not installed.
    """
    section = config.model
    if section.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "model.attention=flash_attention_2 needs a CUDA GPU and the flash-attn package; "
            "install it or choose model.attention=sdpa"
        )
    model_config = transformers_config(section, tokenizer, kept)
    if isinstance(section, PretrainedModel):
        _check_head(section, model_config, config.objective)
    _check_sizes(config, model_config, tokenizer)
    if isinstance(section, PretrainedModel):
        model, values = _load_pretrained(
            section,
            model_config,
            config.objective,
            config.seed,
            kept,
            reads_weights=reads_weights,
        )
    else:
        assert section.causal == (config.objective.kind == "clm"), "checked in RunConfig"
        model_class = _MODEL_CLASSES[section.kind]
        model, values = initialized(lambda: model_class(model_config), config.seed)
        if section.causal:
            model.generation_config = _generation_config(model_config)
    auxiliary_coefficient(model)  # refuses what cannot be given
    # A cache of keys and values is of no use to a forward pass over whole samples.
    model.config.use_cache = False
    fp8.convert(model, config)
    if (every_blocks := config.trainer.checkpoint_activations_every_blocks) is not None:
        offload = config.trainer.offload_activations
        activation_checkpointing.enable(model, every_blocks, offload=offload)
    if config.trainer.compile:
        compile_blocks(model)
    return model.train(), values


def transformers_config(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, kept: Path | None = None
) -> PreTrainedConfig:
    """Map a model section to transformers' config; special token ids come from the tokenizer.

    A pretrained model keeps its own config, read in ``kept`` where there is that. Raises UserError
    where that cannot be read, or where RoBERTa gets a tokenizer without a padding token.
    """
    match model:
        case PretrainedModel():
            return _pretrained_config(model, kept)
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
                rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
                rms_norm_eps=model.rms_norm_epsilon,
                attention_dropout=model.attention_dropout,
                **shared,
            )
    return config


def check_attention(model: ModelConfig, objective: ObjectiveConfig) -> None:
    """Raise UserError where a pretrained model lacks the attention that is asked for.

    For before its data are prepared: what else is wrong with it, `build` says.
    """
    if not isinstance(model, PretrainedModel) or model.attention in ("auto", "eager"):
        return
    auto_class = AutoModelForCausalLM if objective.kind == "clm" else AutoModelForMaskedLM
    trusted = {"trust_remote_code": model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model.name, revision=model.revision, **trusted)
        with torch.device("meta"):
            auto_class.from_config(config, attn_implementation=model.attention, **trusted)
    except Exception as error:  # whatever a model's own code raises
        # transformers 5.23 words it so for each of them, and has no class of error for it.
        if "does not support an attention implementation" not in str(error):
            return
        raise UserError(
            f"model.attention={model.attention}, but the architecture of model.name={model.name} "
            f"({config.model_type}) does not have it; set model.attention=auto, which takes what "
            "it has"
        ) from None


def fitted(config: RunConfig, model: PreTrainedModel) -> RunConfig:
    """Return the config with what only the weights know of their model.

    Raises UserError where it says something else of them.
    """
    section = config.model
    found = getattr(model.config.get_text_config(), "hidden_size", None)
    if not isinstance(section, PretrainedModel) or section.hidden_size == found:
        return config
    if section.hidden_size is not None:
        raise UserError(
            f"model.hidden_size={section.hidden_size}, but model.name={section.name} has {found}; "
            "leave it out"
        )
    return config.model_copy(update={"model": section.model_copy(update={"hidden_size": found})})


def auxiliary_coefficient(model: PreTrainedModel) -> float:
    """Return by how much the model's auxiliary loss counts, by its own config; 0 where it has none.

    Mixture-of-experts models keep their experts equally busy by it. Raises UserError where a config
    asks for one that the model's forward pass does not give.
    """
    config = model.config.get_text_config()
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        coefficient = getattr(model, name, None)
        if coefficient is not None and ROUTER_LOGITS in signature(model.forward).parameters:
            return float(coefficient)
    for name in _OF_AUXILIARY_LOSSES:
        if coefficient := getattr(config, name, None):
            raise UserError(
                f"the model ({config.model_type}) asks for an auxiliary loss by "
                f"{name}={coefficient} in its config.json, which transformers' "
                f"{type(model).__name__} does not give; set it to 0 there to train without, or "
                "choose another model"
            )
    return 0.0


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once, partitioned ones whole."""
    # ZeRO-3 leaves an empty tensor in place and the whole size in ds_numel.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated transformer blocks in order: the units to shard, compile and recompute.

    They are the biggest `ModuleList` (by modules within) whose members are all of one class, among
    the classes that the model names as not to be split where it names any. Raises UserError where
    there is none.
    """
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len({type(member) for member in module}) == 1
        and not isinstance(module[0], nn.ModuleList)
    ]
    unsplit = set(model._no_split_modules or ())
    named = [members for members in lists if type(members[0]).__name__ in unsplit]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no list of equal transformer blocks to shard or compile; "
            "choose another strategy than fsdp and trainer.compile=false, or another model"
        )
    return max(named or lists, key=lambda members: sum(1 for m in members for _ in m.modules()))


def compile_blocks(model: PreTrainedModel) -> None:
    """torch.compile each block in place: equal blocks compile once, and no name changes."""
    for block in blocks(model):
        block.compile()


def _attention(model: ScratchModel | PretrainedModel) -> str | None:
    """Return what transformers is asked for; of None it makes sdpa or eager itself."""
    return None if model.attention == "auto" else model.attention


# --- from scratch -------------------------------------------------------------------------------


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
        "attn_implementation": _attention(model),
        "dtype": torch.float32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not model.causal:
        shared["mask_token_id"] = tokenizer.mask_token_id
    return shared


def _generation_config(config: PreTrainedConfig) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id if config.pad_token_id is None else config.pad_token_id,
        # Learned positions end here; the pipelines' default length may lie beyond.
        max_length=config.max_position_embeddings,
        use_cache=True,
    )


# --- pretrained ---------------------------------------------------------------------------------


def _pretrained_config(model: PretrainedModel, kept: Path | None) -> PreTrainedConfig:
    with loading(model):
        return AutoConfig.from_pretrained(
            kept or model.name,
            revision=None if kept else model.revision,
            trust_remote_code=model.trust_remote_code,
        )


def _load_pretrained(
    model: PretrainedModel,
    config: PreTrainedConfig,
    objective: ObjectiveConfig,
    seed: int,
    kept: Path | None,
    *,
    reads_weights: bool,
) -> tuple[PreTrainedModel, Values]:
    auto_class = AutoModelForCausalLM if objective.kind == "clm" else AutoModelForMaskedLM
    as_asked: dict[str, Any] = {
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": _attention(model),
        "dtype": torch.float32,
    }

    def build() -> PreTrainedModel:
        return auto_class.from_config(config, **as_asked)

    is_quantised = getattr(config, "quantization_config", None) is not None
    with loading(model):
        if not reads_weights and not is_quantised:
            built, values = initialized(build, seed)
        else:
            try:
                files = weight_files(model.name, model.revision, config)
                built, values = streamed(build, files, seed)
            except CannotStream as reason:
                logger.warning(
                    "model.name=%s is loaded whole on every rank, not one tensor at a time: %s",
                    model.name,
                    reason,
                )
                built, values = loaded_whole(auto_class, model, config, as_asked, build, seed)
        if built.can_generate():
            built.generation_config = _pretrained_generation_config(model, kept)
    return built, values


def _pretrained_generation_config(model: PretrainedModel, kept: Path | None) -> GenerationConfig:
    if kept is not None:
        return GenerationConfig.from_pretrained(kept)
    revision = model.revision or "main"
    try:
        return GenerationConfig.from_pretrained(model.name, revision=revision)
    except OSError:  # older models keep theirs among their config
        return GenerationConfig.from_pretrained(
            model.name, "config.json", revision=revision, _from_model_config=True
        )


def _check_head(
    model: PretrainedModel, config: PreTrainedConfig, objective: ObjectiveConfig
) -> None:
    """Raise UserError where the architecture cannot be trained with the objective."""
    own_code = getattr(config, "auto_map", None) or {}
    masked = (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or "AutoModelForMaskedLM" in own_code
    )
    causal = (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own_code
    )
    what = f"model.name={model.name} is of the architecture {config.model_type}"
    if config.is_encoder_decoder:
        raise UserError(
            f"{what}, an encoder-decoder, which fits no objective here; choose an encoder for "
            "objective=mlm or a decoder for objective=clm"
        )
    if masked and causal:
        # Encoders such as BERT can be switched to a decoder; only a flag in the config tells.
        masked, causal = not config.is_decoder, bool(config.is_decoder)
    if causal if objective.kind == "clm" else masked:
        return
    other = "mlm" if masked else "clm" if causal else None
    remedy = f"choose objective={other} or another model" if other else "choose another model"
    raise UserError(f"{what}, which has no head for objective={objective.kind}; {remedy}")


def _check_sizes(
    config: RunConfig, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise UserError where the tokenizer has more tokens or a sample more than the model takes."""
    text_config = model_config.get_text_config()
    rows = text_config.vocab_size
    # Not the number of tokens: ids may have holes, and the highest needs a row too.
    wanted = vocabulary_size(tokenizer)
    if wanted > rows:
        remedy = (
            "choose the tokenizer that belongs to it"
            if config.model.kind == "pretrained"
            else f"set model.vocab_size={wanted} or choose another tokenizer"
        )
        raise UserError(
            f"the tokenizer's ids go up to {wanted - 1} and the model's embedding has only {rows} "
            f"rows; {remedy}"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return
    pad = getattr(text_config, "pad_token_id", None)  # a config with code of its own may lack it
    positions = usable_positions(text_config.model_type, positions, pad)
    if config.data.tokens_per_sample > positions:
        raise UserError(
            f"data.sequence_length={config.data.tokens_per_sample} is longer than the {positions} "
            f"positions of the model ({text_config.model_type}, with this tokenizer); "
            f"set data.sequence_length={positions} or less, or choose another model"
        )
