"""A Hugging Face model directory: its config, what `from_pretrained` expects, whether it loads."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from shardwright.train.checkpoint.format import damage
from shardwright.train.durable import write_text
from shardwright.train.errors import UserError
from shardwright.train.model import generation, older, remote_code
from shardwright.train.process import exhausted

CONFIG = "config.json"
GENERATION_CONFIG = generation.FILE

_WITH_WEIGHTS = "transformers_modules."
"""How modules are named of which transformers runs code that comes with weights."""


def own_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return a model's class without the one that `fully_shard` puts before it."""
    return next(c for c in type(model).__mro__ if not c.__module__.startswith("torch."))


def finished_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of a model in training, as who uses its whole fp32 weights wants it."""
    config = copy.deepcopy(model.config)
    config.architectures = [own_class(model).__name__]
    config.dtype = torch.float32
    # Switched off for training.
    config.use_cache = True
    # The name of the file that a pretrained model's weights came from.
    vars(config).pop("transformers_weights", None)
    return config


def config_texts(model: PreTrainedModel, code: Mapping[str, Path]) -> dict[str, bytes]:
    """Return what says which model the weights of one in training make, by file name.

    That is config.json, generation_config.json where it generates, and the files of its code.
    """
    texts = {CONFIG: older.config_text(finished_config(model)).encode()}
    if model.can_generate() and model.generation_config is not None:
        text = model.generation_config.to_json_string(keys_to_pop=["compile_config"])
        texts[GENERATION_CONFIG] = text.encode()
    return texts | {name: path.read_bytes() for name, path in code.items()}


def write_beside_weights(
    directory: Path, writers: Mapping[str, Callable[[Path], object]]
) -> dict[str, Exception]:
    """Write what a model directory holds besides weights; return what failed, by the writer's name.

    Each writer is given a directory of its own, so that of one that fails nothing is left.
    """
    failed = {}
    for name, write in writers.items():
        apart = directory / ".apart"
        apart.mkdir()
        try:
            write(apart)
            for path in apart.iterdir():
                path.rename(directory / path.name)
        except Exception as error:  # whatever it is, the weights are worth more
            failed[name] = error
        finally:
            shutil.rmtree(apart, ignore_errors=True)
    return failed


def writers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, code: Mapping[str, Path]
) -> dict[str, Callable[[Path], object]]:
    """Return what writes everything of a model directory but its weights and its card."""

    def write_config(directory: Path) -> None:
        write_text(directory / CONFIG, older.config_text(finished_config(model)))

    def write_code(directory: Path) -> None:
        for name, path in code.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)

    def write_generation(directory: Path) -> None:
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(directory)

    return {
        CONFIG: write_config,
        "the model's code": write_code,
        GENERATION_CONFIG: write_generation,
        "the tokenizer": partial(older.save_tokenizer, tokenizer),
    }


def rehearse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    code: Mapping[str, Path],
    objective: str,
    scratch: Path,
    *,
    trusts_code: bool,
) -> None:
    """Write all of a model directory but weights and card, and load it. Removes it again.

    So that what cannot be exported is known before the first step. ``model`` need not have values.
    Raises UserError.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        failed = write_beside_weights(scratch, writers(model, tokenizer, code))
        for what, error in failed.items():
            raise UserError(_not_exported(what, error)) from error
        with remote_code.one_at_a_time() if trusts_code else nullcontext():
            _load_beside_weights(model, scratch, objective, trusts_code=trusts_code)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _load_beside_weights(
    model: PreTrainedModel, directory: Path, objective: str, *, trusts_code: bool
) -> None:
    what = CONFIG
    try:
        auto: Any = getattr(transformers, remote_code.AUTO_CLASSES[objective])
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trusts_code)
        with torch.device("meta"):
            again = auto.from_config(config, trust_remote_code=trusts_code)
        ours, theirs = (
            {n: tuple(p.shape) for n, p in m.named_parameters(remove_duplicate=False)}
            for m in (model, again)
        )
        if ours != theirs:
            raise ValueError("it describes other parameters than those that are trained")
        what = GENERATION_CONFIG
        if (directory / GENERATION_CONFIG).is_file():
            GenerationConfig.from_pretrained(directory)
        what = "the tokenizer"
        AutoTokenizer.from_pretrained(directory, trust_remote_code=trusts_code)
    except Exception as error:  # whatever a library makes of what it has just written
        if exhausted.explained(error) is not None:
            raise
        raise UserError(_not_exported(what, error)) from error


def _not_exported(what: str, error: Exception) -> str:
    return (
        f"final/ could not be written at the end of this run: {what} cannot be saved and loaded "
        f"again ({damage.in_one_line(error)}). Nothing has been trained; correct it in the model's "
        "or the tokenizer's own files, or choose others"
    )


def parsed_config(path: Path) -> dict[str, Any]:
    """Return a config.json that names its architecture. Raises UserError."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problem = damage.problem(path) or f"{path} cannot be read ({damage.in_one_line(error)})"
        raise UserError(f"{problem}, or give another with --config") from None
    names = tree.get("architectures") if isinstance(tree, dict) else None
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise UserError(
            f'{path} names no architecture; add "architectures", such as ["GPT2LMHeadModel"], or '
            "give another config with --config"
        )
    # As transformers names it where it saves what `fully_shard` has wrapped.
    return {**tree, "architectures": [names[0].removeprefix("FSDP")]}


def architecture(path: Path, *, trusts_code: bool = False) -> type[PreTrainedModel]:
    """Return the class that a config.json names. Raises UserError.

    That may be in code which lies beside it, where that is trusted.
    """
    tree = parsed_config(path)
    name = tree["architectures"][0]
    found = _registered(name) or getattr(transformers, name, None)
    key = own_auto_class(tree)
    if key is not None and (trusts_code or found is None):
        if not trusts_code:
            raise UserError(
                f"{path} is that of {name}, a model with Python code of its own "
                f"({remote_code.names(tree)}), which is not run by default; read it, then add "
                f"{remote_code.FLAG}"
            )
        files = remote_code.beside(path.parent, tree)
        if lost := remote_code.missing(files, tree, key):
            raise UserError(
                f"{path} is that of {name}, whose code {lost} is not in {path.parent}; give a "
                "directory that holds config.json and the code with --config"
            )
        with _building(path, name), remote_code.one_at_a_time():
            reference = remote_code.own(tree)[key]
            return get_class_from_dynamic_module(reference, path.parent)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UserError(
            f"{path} is that of {name}, which transformers {transformers.__version__} does not "
            "have, and it names no code of the model's own; install a version that has it, or give "
            "another config with --config"
        )
    return found


def _registered(name: str) -> type[PreTrainedModel] | None:
    """Return the class of this name that somebody has registered with transformers' Auto classes.

    transformers 5.23 keeps those apart from its own, and has no public list of either. Code that
    came with some weights is there as well once it was run: others have to trust it anew.
    """
    for auto in (AutoModelForCausalLM, AutoModelForMaskedLM):
        for found in auto._model_mapping._extra_content.values():
            if not isinstance(found, type) or found.__module__.startswith(_WITH_WEIGHTS):
                continue
            if found.__name__ == name:
                return found
    return None


def own_auto_class(config_json: Mapping[str, Any]) -> str | None:
    """Return under which automatic class a model's own code stands; None without such. Pure."""
    name = str((config_json.get("architectures") or [""])[0])
    own = remote_code.own(config_json)
    for key, reference in own.items():
        if key.startswith("AutoModel") and reference.rpartition(".")[2] == name:
            return key
    return next((key for key in remote_code.AUTO_CLASSES.values() if key in own), None)


def auto_class(model_class: type[PreTrainedModel], config_json: Mapping[str, Any]) -> Any:
    """Return the class whose `from_pretrained` loads a model: `pipeline`'s, where it has one."""
    if model_class.__module__.startswith(_WITH_WEIGHTS):
        return getattr(transformers, str(own_auto_class(config_json)), model_class)
    for auto in (AutoModelForCausalLM, AutoModelForMaskedLM):
        if model_class in auto._model_mapping._extra_content.values():
            return auto
    if model_class.__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return AutoModelForMaskedLM
    if model_class.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return AutoModelForCausalLM
    return model_class


def on_meta(model_class: Any, path: Path, *, trusts_code: bool = False) -> PreTrainedModel:
    """Return the model of a config.json, without values. Raises UserError."""
    with _building(path, model_class.__name__):
        own = remote_code.own(parsed_config(path)).get("AutoConfig") if trusts_code else None
        if own is not None:
            with remote_code.one_at_a_time():
                config_class: Any = get_class_from_dynamic_module(own, path.parent)
            config = config_class.from_pretrained(path)
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            return model_class(config)


@contextmanager
def _building(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a class makes of values that it does not expect
        raise UserError(
            f"{path} describes no {name} that transformers "
            f"{transformers.__version__} can build ({type(error).__name__}: {error}); give another "
            "with --config"
        ) from None


def check_loads(directory: Path, model_class: Any, *, trusts_code: bool = False) -> None:
    """Let `from_pretrained` find every weight of the model, on the meta device.

    Raises WrongWeights naming the weights that are missing, unexpected or of another shape, and
    what transformers raises where the rest of the directory does not load.
    """
    with remote_code.one_at_a_time() if trusts_code else nullcontext():
        loaded: Any = model_class.from_pretrained(
            directory,
            device_map="meta",
            output_loading_info=True,
            # Not None, for which it would ask on the terminal and wait.
            trust_remote_code=trusts_code,
        )
    _, info = loaded
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if wrong or info.get("error_msgs"):
        raise WrongWeights(f"{directory} does not load: {wrong or info['error_msgs']}")


class WrongWeights(RuntimeError):
    """A directory's weights are not those of its config."""
