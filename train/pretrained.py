"""A pretrained checkpoint's weights, one tensor at a time, under the names that the model has."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import _get_resolved_checkpoint_files

from train.logs import log
from train.weights import Values, initialized


class CannotStream(Exception):
    """The checkpoint can only be loaded as a whole; the message says why."""


def weight_files(name: str, revision: str | None, config: PreTrainedConfig) -> list[str]:
    """Return the files that `from_pretrained` would load, downloaded where they are not here.

    Raises OSError where there are none, CannotStream where it would do more than load them.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise CannotStream("its weights are quantised")
    if getattr(type(config), "extra_files", None):
        raise CannotStream("its weights lie in files of a kind of its own")
    files, _ = _get_resolved_checkpoint_files(
        pretrained_model_name_or_path=name,
        variant=None,
        gguf_file=None,
        use_safetensors=None,
        user_agent={"file_type": "model", "framework": "pytorch"},
        is_remote_code=bool(getattr(config, "auto_map", None)),
        transformers_explicit_filename=getattr(config, "transformers_weights", None),
        download_kwargs={"revision": revision, "local_files_only": is_offline_mode()},
    )
    assert files is not None
    return files


def streamed(
    build: Callable[[], PreTrainedModel], files: Sequence[str], seed: int
) -> tuple[PreTrainedModel, Values]:
    """Return a model whose parameters are on the meta device, and their values in ``files``.

    ``files`` are safetensors, or what `torch.save` wrote. The values are bit for bit those that
    `from_pretrained` loads in fp32; parameters that the files lack get the architecture's own
    initialisation, from ``seed``, and are named in a warning. Raises CannotStream where a parameter
    is not a single tensor of the files, or is missing and initialised in a way of its own.
    """
    model, initial = initialized(build, seed)
    checkpoint = _Checkpoint(files)
    found = _names(model, checkpoint)
    for name, buffer in model.named_buffers():
        if name in found:
            checkpoint.read(found[name], buffer)
    _untie_what_differs(model, found, checkpoint)

    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    values: Values = {}
    missing = []
    for parameter, names in aliases.items():
        keys = [found[name] for name in names if name in found]
        if keys:
            values[names[0]] = functools.partial(checkpoint.read, keys[0])
        elif names[0] in initial:
            values[names[0]] = initial[names[0]]
            missing.append(names[0])
        else:
            raise CannotStream(f"{names[0]}, which it lacks, is initialised in a way of its own")
        assert parameter.is_meta
    if missing:
        log.warning("not in the checkpoint, initialised anew: %s", ", ".join(missing))
    return model, values


class _Checkpoint:
    """Files of tensors: names, shapes and kinds at once, values one by one."""

    def __init__(self, files: Sequence[str]) -> None:
        self.empty: dict[str, torch.Tensor] = {}
        """Each tensor on the meta device; in fp32 where it is of floating point."""
        self._file: dict[str, str] = {}
        self._mapped: dict[str, torch.Tensor] = {}
        for file in files:
            if file.endswith(".safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118
                        part = tensors.get_slice(key)
                        kind = part.get_dtype()
                        is_float = kind.startswith(("F", "BF"))
                        dtype = torch.float32 if is_float else torch.int64
                        self._file[key] = file
                        self.empty[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
            else:
                try:
                    self._mapped |= torch.load(
                        file, map_location="cpu", mmap=True, weights_only=True
                    )
                except (RuntimeError, pickle.UnpicklingError) as error:
                    raise CannotStream(f"{file} cannot be mapped: {error}") from None
        for key, tensor in self._mapped.items():
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            self.empty[key] = torch.empty(tensor.shape, dtype=dtype, device="meta")

    def read(self, key: str, out: torch.Tensor) -> None:
        # Copied: the tensor itself is the file's own pages, and the file may be written anew.
        if key in self._mapped:
            out.copy_(self._mapped[key])
            return
        # Opened anew, or all that was read before would stay mapped and count as used memory.
        with safe_open(self._file[key], framework="pt") as tensors:
            out.copy_(tensors.get_tensor(key))

    def whole(self, key: str) -> torch.Tensor:
        tensor = torch.empty_like(self.empty[key], device="cpu")
        self.read(key, tensor)
        return tensor


class _Named:
    """What safetensors calls a slice: a tensor that is read once it is indexed."""

    def __init__(self, empty: torch.Tensor) -> None:
        self.parameter = nn.Parameter(empty, requires_grad=empty.is_floating_point())

    def __getitem__(self, index: Any) -> nn.Parameter:
        return self.parameter


def _names(model: PreTrainedModel, checkpoint: _Checkpoint) -> dict[str, str]:
    """Return which of the checkpoint's tensors each parameter and buffer of the model is.

    transformers itself loads the checkpoint, with parameters that hold nothing: whatever it
    renames, strips or prefixes, what becomes one of them as it is becomes that very object.
    """
    named = {key: _Named(empty) for key, empty in checkpoint.empty.items()}
    loaded = type(model).from_pretrained(
        None, config=model.config, state_dict=named, dtype=torch.float32, device_map="meta"
    )
    keys = {id(tensor.parameter): key for key, tensor in named.items()}
    found = {}
    for name, tensor in loaded.state_dict(keep_vars=True).items():
        if id(tensor) in keys:
            found[name] = keys[id(tensor)]
        elif (
            getattr(tensor, "_is_hf_initialized", False)
            and name not in loaded.all_tied_weights_keys
        ):
            raise CannotStream(f"{name} is made out of other tensors of the checkpoint")
    return found


def _untie_what_differs(
    model: PreTrainedModel, found: dict[str, str], checkpoint: _Checkpoint
) -> None:
    """Untie, as `from_pretrained` does, what the checkpoint has under both names and unequal."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target not in found or source not in found:
            continue
        if torch.equal(checkpoint.whole(found[target]), checkpoint.whole(found[source])):
            continue
        parent, _, attribute = target.rpartition(".")
        tied = model.get_parameter(target)
        setattr(
            model.get_submodule(parent), attribute, nn.Parameter(tied.detach(), tied.requires_grad)
        )
        del model.all_tied_weights_keys[target]
        log.warning("%s and %s differ in the checkpoint and are not tied", target, source)
