"""A model that brings its own config, with weights or without: what is taken of it, what fits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from shardwright.train.config import (
    ConfigModel,
    NamedModel,
    ObjectiveConfig,
    PretrainedModel,
    ScratchModel,
)
from shardwright.train.config.model import NOT_QUANTIZED
from shardwright.train.config.section import shown
from shardwright.train.errors import UserError
from shardwright.train.model import adapter_base, remote_code, rotary, saved
from shardwright.train.model.overrides import overridden, shape_changes
from shardwright.train.model.streaming import (
    CannotStream,
    loaded_whole,
    loading,
    streamed,
    weight_files,
)
from shardwright.train.model.weights import InitialValues, initialized

logger = logging.getLogger(__name__)


def check_before_data(model: NamedModel, objective: ObjectiveConfig) -> None:
    """Raise UserError where a model by name lacks the attention, positions or keys asked for.

    For before its data are prepared: what else is wrong with it, `build` says.
    """
    if model.other_positions or model.overrides:
        named_config(model, None)
    if model.attention not in ("auto", "eager"):
        _check_attention(model, objective)


def _check_attention(model: NamedModel, objective: ObjectiveConfig) -> None:
    auto_class = auto_class_of(objective)
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


def attention_of(model: ScratchModel | NamedModel) -> str | None:
    """Return what transformers is asked for; of None it makes sdpa or eager itself."""
    return None if model.attention == "auto" else model.attention


def named_config(model: NamedModel, kept: Path | None) -> PreTrainedConfig:
    """Return a model's own config, read in ``kept`` where there is that, with what is overridden.

    Raises UserError.
    """
    with loading(model):
        config = AutoConfig.from_pretrained(
            kept or model.name,
            revision=None if kept else model.revision,
            trust_remote_code=model.trust_remote_code,
        )
        config = overridden(config, model, kept)
    if isinstance(model, PretrainedModel):
        rotary.extend(config, model)
    return config


def from_config(
    model: ConfigModel, config: PreTrainedConfig, objective: ObjectiveConfig, seed: int
) -> tuple[PreTrainedModel, InitialValues]:
    """Return a model of any architecture, initialised as it initialises itself."""
    with loading(model):
        return initialized(_builder(model, config, objective), seed)


def load_pretrained(
    model: PretrainedModel,
    config: PreTrainedConfig,
    objective: ObjectiveConfig,
    seed: int,
    kept: Path | None,
    *,
    reads_weights: bool,
) -> tuple[PreTrainedModel, InitialValues]:
    build, auto_class = _builder(model, config, objective), auto_class_of(objective)
    is_quantised = getattr(config, "quantization_config", None) is not None
    is_packed = model.quantization != NOT_QUANTIZED
    with loading(model):
        if is_packed:
            _check_can_be_read_again(model, is_quantised=is_quantised)
        if model.overrides:
            _check_shapes(model, build, objective, kept)
        if not reads_weights and not is_quantised:
            built, values = initialized(build, seed)
        elif saved.is_checkpoint(model.name):
            built, values = saved.of_another_run(build, Path(model.name), seed)
        else:
            try:
                files = weight_files(model.name, model.revision, config)
                built, values = streamed(build, files, seed)
                adapter_base.note_revision(built, files)
            except CannotStream as reason:
                if is_packed:
                    raise UserError(_not_read_again(model, str(reason))) from None
                logger.warning(
                    "model.name=%s is loaded whole on every rank, not one tensor at a time: %s",
                    model.name,
                    reason,
                )
                built, values = loaded_whole(
                    auto_class, model, config, _as_asked(model), build, seed
                )
        rotary.check(built, model)
        if built.can_generate():
            built.generation_config = pretrained_generation_config(model, kept)
    return built, values


def _check_can_be_read_again(model: PretrainedModel, *, is_quantised: bool) -> None:
    """Raise UserError where checkpoints without the weights could not find them again."""
    if is_quantised:
        raise UserError(_not_read_again(model, "they are quantised already"))
    if saved.is_checkpoint(model.name):
        raise UserError(
            _not_read_again(model, "it is a checkpoint of a run, which may be deleted; give final/")
        )


def _not_read_again(model: PretrainedModel, reason: str) -> str:
    return (
        f"model.quantization={model.quantization}: checkpoints hold what is trained alone, and the "
        f"weights of model.name={model.name} cannot be read one tensor at a time: {reason}. Save "
        "them in safetensors as `from_pretrained` loads them, or set model.quantization=none"
    )


def auto_class_of(objective: ObjectiveConfig) -> Any:
    """Return the class of transformers whose `from_pretrained` loads what an objective trains."""
    return getattr(transformers, remote_code.AUTO_CLASSES[objective.kind])


def _as_asked(model: NamedModel) -> dict[str, Any]:
    return {
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention_of(model),
        "dtype": torch.float32,
    }


def _builder(
    model: NamedModel, config: PreTrainedConfig, objective: ObjectiveConfig
) -> Callable[[], PreTrainedModel]:
    auto_class = auto_class_of(objective)
    return lambda: auto_class.from_config(config, **_as_asked(model))


def _check_shapes(
    model: PretrainedModel,
    build: Callable[[], PreTrainedModel],
    objective: ObjectiveConfig,
    kept: Path | None,
) -> None:
    """Raise UserError where the weights would not fit a model with these overrides."""
    unchanged = model.model_copy(update={"overrides": {}})
    plain = _builder(unchanged, named_config(unchanged, kept), objective)
    with torch.device("meta"):
        before, after = (
            {name: list(p.shape) for name, p in made().named_parameters()}
            for made in (plain, build)
        )
    if (difference := shape_changes(before, after)) is not None:
        raise UserError(
            f"model.overrides={shown(model.overrides)} does not fit the weights of "
            f"model.name={model.name}: {difference}; leave out what changes shapes, or train from "
            "scratch with model=from_config"
        )


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


def check_head(model: NamedModel, config: PreTrainedConfig, objective: ObjectiveConfig) -> None:
    """Raise UserError where the architecture cannot be trained with the objective."""
    own_code = getattr(config, "auto_map", None) or {}
    masked = _has_head(AutoModelForMaskedLM, config) or "AutoModelForMaskedLM" in own_code
    causal = _has_head(AutoModelForCausalLM, config) or "AutoModelForCausalLM" in own_code
    what = f"model.name={model.name} is of the architecture {config.model_type}"
    if config.is_encoder_decoder:
        _check_encoder_decoder(what, config, objective)
        return
    if objective.is_encoder_decoder:
        causal = causal and not masked
        raise UserError(
            f"{what}, which is no encoder-decoder, as objective={objective.kind} needs; choose "
            f"objective={'clm' if causal else 'mlm'}, or a T5"
        )
    if masked and causal:
        # Encoders such as BERT can be switched to a decoder; only a flag in the config tells.
        masked, causal = not config.is_decoder, bool(config.is_decoder)
    if masked if objective.is_masked else causal:
        return
    other = "mlm" if masked else "clm" if causal else None
    remedy = f"choose objective={other} or another model" if other else "choose another model"
    raise UserError(f"{what}, which has no head for objective={objective.kind}; {remedy}")


T5S = ("mt5", "t5", "umt5")
"""Model types of the encoder-decoders whose decoder begins with padding, as it is trained here."""


def _check_encoder_decoder(what: str, config: PreTrainedConfig, objective: ObjectiveConfig) -> None:
    if not objective.is_encoder_decoder:
        fits = "objective=span_corruption" if config.model_type in T5S else "no objective here"
        raise UserError(
            f"{what}, an encoder-decoder, which fits {fits}, and not objective={objective.kind}; "
            "choose an encoder for objective=mlm or a decoder for objective=clm"
        )
    if config.model_type not in T5S:
        raise UserError(
            f"{what}, and objective={objective.kind} trains those of the T5 family "
            f"({', '.join(T5S)}): others begin to write, tell positions apart or were trained "
            "otherwise; choose one of these"
        )


def _has_head(auto_class: Any, config: PreTrainedConfig) -> bool:
    """Whether transformers, or what has been registered with it, has a model with this head."""
    return type(config) in auto_class._model_mapping
