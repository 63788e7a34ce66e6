"""A model that brings its own config and weights: what is taken of it, and whether it fits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from shardwright.train.config import (
    ObjectiveConfig,
    PretrainedModel,
    ScratchModel,
)
from shardwright.train.errors import UserError
from shardwright.train.model import rotary
from shardwright.train.model.streaming import (
    CannotStream,
    loaded_whole,
    loading,
    streamed,
    weight_files,
)
from shardwright.train.model.weights import InitialValues, initialized

logger = logging.getLogger(__name__)


def check_before_data(model: PretrainedModel, objective: ObjectiveConfig) -> None:
    """Raise UserError where a pretrained model lacks the attention or positions asked for.

    For before its data are prepared: what else is wrong with it, `build` says.
    """
    if model.other_positions:
        pretrained_config(model, None)
    if model.attention not in ("auto", "eager"):
        _check_attention(model, objective)


def _check_attention(model: PretrainedModel, objective: ObjectiveConfig) -> None:
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
            f"({config.model_type}) does not have it; set model.attention=auto, which uses what "
            "it has"
        ) from None


def attention_of(model: ScratchModel | PretrainedModel) -> str | None:
    """Return what transformers is asked for; of None it makes sdpa or eager itself."""
    return None if model.attention == "auto" else model.attention


def pretrained_config(model: PretrainedModel, kept: Path | None) -> PreTrainedConfig:
    with loading(model):
        config = AutoConfig.from_pretrained(
            kept or model.name,
            revision=None if kept else model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    rotary.extend(config, model)
    return config


def load_pretrained(
    model: PretrainedModel,
    config: PreTrainedConfig,
    objective: ObjectiveConfig,
    seed: int,
    kept: Path | None,
    *,
    reads_weights: bool,
) -> tuple[PreTrainedModel, InitialValues]:
    auto_class = AutoModelForCausalLM if objective.kind == "clm" else AutoModelForMaskedLM
    as_asked: dict[str, Any] = {
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention_of(model),
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
        rotary.check(built, model)
        if built.can_generate():
            built.generation_config = pretrained_generation_config(model, kept)
    return built, values


def pretrained_generation_config(model: PretrainedModel, kept: Path | None) -> GenerationConfig:
    if kept is not None:
        return GenerationConfig.from_pretrained(kept)
    revision = model.revision or "main"
    try:
        return GenerationConfig.from_pretrained(model.name, revision=revision)
    except OSError:  # older models keep theirs among their config
        return GenerationConfig.from_pretrained(
            model.name, "config.json", revision=revision, _from_model_config=True
        )


def check_head(
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
