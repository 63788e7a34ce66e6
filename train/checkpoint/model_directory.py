"""A Hugging Face model directory: its config, what `from_pretrained` expects, whether it loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from train.errors import UserError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


def finished_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of a model in training, as who uses its whole fp32 weights wants it."""
    config = copy.deepcopy(model.config)
    # Without the class that `fully_shard` puts before the model's own.
    own = next(c for c in type(model).__mro__ if not c.__module__.startswith("torch."))
    config.architectures = [own.__name__]
    config.dtype = torch.float32
    # Switched off for training.
    config.use_cache = True
    # The name of the file that a pretrained model's weights came from.
    vars(config).pop("transformers_weights", None)
    return config


def config_texts(model: PreTrainedModel) -> dict[str, bytes]:
    """Return config.json of a model in training, and generation_config.json where it generates."""
    texts = {CONFIG: finished_config(model).to_json_string().encode()}
    if model.can_generate() and model.generation_config is not None:
        text = model.generation_config.to_json_string(keys_to_pop=["compile_config"])
        texts[GENERATION_CONFIG] = text.encode()
    return texts


def parsed_config(path: Path) -> dict[str, Any]:
    """Return a config.json that names its architecture. Raises UserError."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); give another with --config") from None
    names = tree.get("architectures") if isinstance(tree, dict) else None
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise UserError(
            f'{path} names no architecture; add "architectures", such as ["GPT2LMHeadModel"], or '
            "give another config with --config"
        )
    # As transformers names it where it saves what `fully_shard` has wrapped.
    return {**tree, "architectures": [names[0].removeprefix("FSDP")]}


def architecture(path: Path) -> type[PreTrainedModel]:
    """Return the class that a config.json names. Raises UserError."""
    name = parsed_config(path)["architectures"][0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UserError(
            f"{path} is that of {name}, which transformers {transformers.__version__} does not "
            "have; code that a model brings along is not run here"
        )
    return found


def auto_class(model_class: type[PreTrainedModel]) -> Any:
    """Return the class whose `from_pretrained` loads a model: `pipeline`'s, where it has one."""
    if model_class.__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return AutoModelForMaskedLM
    if model_class.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return AutoModelForCausalLM
    return model_class


def on_meta(model_class: Any, path: Path) -> PreTrainedModel:
    """Return the model of a config.json, without values. Raises UserError."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # whatever a class makes of values that it does not expect
        raise UserError(
            f"{path} describes no {model_class.__name__} that transformers "
            f"{transformers.__version__} can build ({type(error).__name__}: {error}); give another "
            "with --config"
        ) from None


def check_loads(directory: Path, model_class: Any) -> None:
    """Let `from_pretrained` find every weight of the model, on the meta device.

    Raises RuntimeError naming the weights that are missing, unexpected or of another shape.
    """
    loaded: Any = model_class.from_pretrained(
        directory, device_map="meta", output_loading_info=True
    )
    _, info = loaded
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if wrong or info.get("error_msgs"):
        raise RuntimeError(f"{directory} does not load: {wrong or info['error_msgs']}")
