"""From a size preset or a pretrained name to a model with its objective's head, and its weights."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from shardwright.train.config import (
    ConfigModel,
    NamedModel,
    PretrainedModel,
    RunConfig,
)
from shardwright.train.config.positions import usable_positions
from shardwright.train.errors import UserError
from shardwright.train.model import (
    activation_checkpointing,
    activations,
    adapter,
    fp8,
    head_loss,
)
from shardwright.train.model.blocks import parameter_count
from shardwright.train.model.configs import MODEL_CLASSES, transformers_config
from shardwright.train.model.generation import generation_config
from shardwright.train.model.pretrained import check_head, from_config, load_pretrained
from shardwright.train.model.vocabulary import vocabulary_size
from shardwright.train.model.weights import InitialValues, initialized
from shardwright.train.run_directory.names import OBJECTIVE_KEY

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


def build(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    kept: Path | None = None,
    *,
    reads_weights: bool = True,
) -> tuple[PreTrainedModel, InitialValues]:
    """Return the run's model, in training mode and without values, and its parameters' fp32 values.

    What a model by name brings, its config, generation settings and code, is read in ``kept``, or
    where it comes from if there is none. Where a run is resumed its weights need not be read, and
    the values are without meaning then.

    The parameters are on the meta device: `Engine.shard` gives each rank its part of them. From
    scratch, the values are a function of the config and ``config.seed`` alone; pretrained ones are
    read tensor by tensor, where that is possible. The model recomputes if asked
    for; whether it compiles is settled later (`compilation.settled`).

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
    if section.attention == "flash_attention_2" and config.trainer.deterministic:
        _check_flash_attention_repeats()
    model_config = transformers_config(section, tokenizer, kept)
    if isinstance(section, NamedModel):
        check_head(section, model_config, config.objective)
    _check_sizes(config, model_config, tokenizer)
    if isinstance(section, PretrainedModel):
        model, values = load_pretrained(
            section,
            model_config,
            config.objective,
            config.seed,
            kept,
            reads_weights=reads_weights,
        )
        model, values = adapter.inject(model, values, config)
    elif isinstance(section, ConfigModel):
        model, values = from_config(section, model_config, config.objective, config.seed)
    else:
        assert section.is_encoder_decoder == config.objective.is_encoder_decoder, "checked there"
        assert not (section.causal and config.objective.is_masked), "in RunConfig"
        model_class = MODEL_CLASSES[section.kind]
        model, values = initialized(lambda: model_class(model_config), config.seed)
    if not config.objective.is_masked and not isinstance(section, PretrainedModel):
        model.generation_config = generation_config(model_config)
    _note_objective(model, config.objective.kind)
    auxiliary_coefficient(model)  # refuses what cannot be given
    _use_no_cache(model)
    if getattr(section, "fused_gelu", False):
        activations.fuse(model)
    fp8.convert(model, config)
    if (every_blocks := config.trainer.recomputed_every_blocks) is not None:
        offload = config.trainer.offload_activations
        activation_checkpointing.enable(
            model, every_blocks, offload=offload, parts=config.trainer.recompute
        )
    return model.train(), values


def _use_no_cache(model: PreTrainedModel) -> None:
    """Keep no keys and values, which are of no use to a forward pass over whole samples.

    The stacks of an encoder-decoder have copies of the config (transformers 5.23, T5).
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False


def _note_objective(model: PreTrainedModel, objective: str) -> None:
    """Have config.json say of a masked model that diffusion has trained it, and of no other."""
    vars(model.config).pop(OBJECTIVE_KEY, None)
    if objective == "diffusion":
        setattr(model.config, OBJECTIVE_KEY, objective)


def _check_flash_attention_repeats() -> None:
    """Raise UserError where the installed one is too old to be told, which transformers passes over
    without a word (5.23, modeling_flash_attention_utils.py)."""
    import inspect
    from importlib import import_module

    installed = import_module("flash_attn")
    if "deterministic" not in inspect.signature(installed.flash_attn_func).parameters:
        raise UserError(
            "trainer.deterministic=true with model.attention=flash_attention_2 needs flash-attn "
            "2.4.1 or later; update it, or choose model.attention=sdpa"
        )


def fitted(config: RunConfig, model: PreTrainedModel) -> RunConfig:
    """Return the config with what only the model itself knows, and where it has some, its weights.

    Raises UserError where the config says something else of them.
    """
    return _with_fused_loss(_with_size(config, model), model)


def _with_fused_loss(config: RunConfig, model: PreTrainedModel) -> RunConfig:
    wanted = config.trainer.fused_loss
    if wanted is False:
        return config
    # Of an own loss alone the rules of the config say no to true.
    problem = None if config.objective.loss is None else "objective.loss takes logits"
    problem = problem or head_loss.why_not(model)
    if problem is not None and wanted is True:
        raise head_loss.refusal(problem)
    trainer = config.trainer.model_copy(update={"fused_loss": problem is None})
    return config.model_copy(update={"trainer": trainer})


def _with_size(config: RunConfig, model: PreTrainedModel) -> RunConfig:
    section = config.model
    found = getattr(model.config.get_text_config(), "hidden_size", None)
    if not isinstance(section, NamedModel):
        return config
    if section.hidden_size not in (None, found):
        remedy = "leave it out"
        if isinstance(section, ConfigModel):
            remedy += ", or set model.overrides.hidden_size"
        raise UserError(
            f"model.hidden_size={section.hidden_size}, but model.name={section.name} has {found}; "
            f"{remedy}"
        )
    known = section.found_to_have(hidden_size=found, parameters=parameter_count(model))
    return config.model_copy(update={"model": known})


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
                f"the model ({config.model_type}) requires an auxiliary loss by "
                f"{name}={coefficient} in its config.json, which transformers' "
                f"{type(model).__name__} does not return; set it to 0 there to train without, or "
                "choose another model"
            )
    return 0.0


def check_decoder_start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where a decoder begins with another token than it is trained to begin with.

    Batches begin with the tokenizer's padding, and whoever generates with what config.json says.
    """
    begins, padding = model.config.decoder_start_token_id, tokenizer.pad_token_id
    if begins != padding:
        raise UserError(
            f"the decoder of the model begins with token {begins} (decoder_start_token_id in its "
            f"config.json), and the tokenizer's padding, with which it is trained to begin, is "
            f"{padding}; choose the tokenizer that belongs to the model"
        )


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
    if config.data.longest_sample > positions:
        raise UserError(
            f"data.sequence_length={config.data.longest_sample} is longer than the {positions} "
            f"positions of the model ({text_config.model_type}, with this tokenizer); "
            f"set data.sequence_length={positions} or less, or choose another model"
        )
