"""A pretrained checkpoint's weights, one tensor at a time, under the names that the model has."""

from __future__ import annotations

import logging
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import _get_resolved_checkpoint_files

from shardwright.train.checkpoint.format import damage
from shardwright.train.checkpoint.read import plain as read_plain
from shardwright.train.checkpoint.read.names import WRAPPERS, unwrapped
from shardwright.train.config import NamedModel, PretrainedModel
from shardwright.train.errors import UserError
from shardwright.train.model import remote_code
from shardwright.train.model.conversion import CannotTrace, Traced, loaded
from shardwright.train.model.weights import (
    InitialValue,
    InitialValues,
    InMemory,
    emptied,
    initialized,
)
from shardwright.train.process import exhausted

logger = logging.getLogger(__name__)


class CannotStream(Exception):
    """The checkpoint can only be loaded as a whole; the message says why."""


@contextmanager
def loading(model: NamedModel) -> Iterator[None]:
    """Turn what loading a model raises into a UserError that says what to do.

    Where its code is run, this node's processes load it one after the other.
    """
    try:
        with remote_code.one_at_a_time() if model.trust_remote_code else nullcontext():
            yield
    except (UserError, CannotStream):
        raise
    except Exception as error:
        if exhausted.explained(error) is not None:
            raise
        what, directory = f"model.name={model.name}", Path(model.name)
        if directory.is_dir() and (problem := next(damage.problems(directory), None)):
            raise UserError(f"{what} cannot be loaded: {problem}") from error
        reason = damage.in_one_line(error)
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what} comes with Python code of its own, which is not run by default; read "
                "it, then set model.trust_remote_code=true, or choose another model"
            ) from None
        if isinstance(error, OSError):
            raise UserError(
                f"{what} cannot be loaded: it is not a complete model directory here, and the "
                f"Hugging Face hub does not have it or cannot be reached ({reason}). Check the "
                f"name; without network, run `hf download {model.name} --local-dir DIR` where "
                "there is one, copy DIR here and set model.name=DIR"
            ) from None
        own = "model.overrides, " if model.overrides else ""
        raise UserError(
            f"{what} cannot be loaded: {reason}; correct {own}its config.json and files, or choose "
            "another model"
        ) from error


def weight_files(name: str, revision: str | None, config: PreTrainedConfig) -> list[str]:
    """Return the files that `from_pretrained` would load, downloaded where they are not here.

    Raises OSError where there are none, CannotStream where it would do more than load them.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise CannotStream("its weights are quantised")
    if getattr(type(config), "extra_files", None):
        raise CannotStream("its weights lie in files of an unusual kind")
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
) -> tuple[PreTrainedModel, InitialValues]:
    """Return a model whose parameters are on the meta device, and their values in ``files``.

    ``files`` are safetensors, or what `torch.save` wrote. The values are bit for bit those that
    `from_pretrained` loads in fp32; parameters of the head that the files lack get the
    architecture's own initialisation, from ``seed``, and are named in a warning. Raises
    CannotStream where a parameter is computed out of the files' tensors, or is missing and
    initialised in a way of its own, and UserError where the files lack any other, or have it in
    another shape.
    """
    model, initial = initialized(build, seed)
    checkpoint = _Checkpoint(files, set(model.state_dict()))
    found = _made_of(model, checkpoint)
    for name, buffer in model.named_buffers():
        if name in found:
            buffer.copy_(checkpoint.whole(found[name]))
    _untie_what_differs(model, found, checkpoint)

    values: InitialValues = {}
    missing, without_value = [], []
    for names in _aliases(model):
        held = next((found[name] for name in names if name in found), None)
        if held is not None:
            values[names[0]] = _InFiles(checkpoint, held)
            continue
        missing.append(names[0])
        if names[0] in initial:
            values[names[0]] = initial[names[0]]
        else:
            without_value.append(names[0])
    check_found(model, missing, checkpoint.empty, files)
    if without_value:
        raise CannotStream(f"{without_value[0]}, which it lacks, is initialised in a special way")
    return model, values


def loaded_whole(
    auto_class: Any,
    model: PretrainedModel,
    config: PreTrainedConfig,
    as_asked: dict[str, Any],
    build: Callable[[], PreTrainedModel],
    seed: int,
) -> tuple[PreTrainedModel, InitialValues]:
    """Return the same of weights that cannot be streamed: the whole of them stays in memory."""
    # The names of wrappers, wherever they stand; DDP's, where it begins one.
    wrappers = {rf"(^|\.){name}\.": r"\1" for name in WRAPPERS} | {r"^module\.": ""}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        whole, info = auto_class.from_pretrained(
            model.name,
            config=config,
            revision=model.revision,
            key_mapping=wrappers,
            output_loading_info=True,
            **as_asked,
        )
    drawn = set(info["missing_keys"])
    missing = [names[0] for names in _aliases(whole) if drawn.issuperset(names)]
    check_found(whole, missing, sorted(info["unexpected_keys"]), [model.name])
    emptied_model, values = emptied(whole)
    initial = initialized(build, seed)[1] if missing else {}
    for name in missing:
        # As it would be drawn anywhere else; what has a way of its own keeps what it was given.
        own = values[name]
        assert isinstance(own, InMemory)
        values[name] = initial.get(name) or InMemory(own.tensor, is_drawn=True)
    return emptied_model, values


def _aliases(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter, the one of `named_parameters` first."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return list(names.values())


# --- what the files lack ------------------------------------------------------------------------


def head_parameters(model: PreTrainedModel) -> set[str]:
    """Return the names of what an architecture puts on top of its base model."""
    names = {name for name, _ in model.named_parameters()}
    if model.base_model is not model:
        return {n for n in names if not n.startswith(f"{model.base_model_prefix}.")}
    head = model.get_output_embeddings()
    own = set(head.parameters()) if head is not None else set()
    return {name for name, parameter in model.named_parameters() if parameter in own}


def check_found(
    model: PreTrainedModel, missing: Sequence[str], held: Iterable[str], files: Sequence[str]
) -> None:
    """Warn of the missing parameters of the head. Raises UserError where any other is missing."""
    head, accepted = head_parameters(model), model._keys_to_ignore_on_load_missing or ()
    lacking = [
        name
        for name in missing
        if name not in head and not any(re.search(pattern, name) for pattern in accepted)
    ]
    if lacking:
        count = sum(1 for _ in model.named_parameters())
        names = list(held)
        raise UserError(
            f"{_shortened(files)} lacks {len(missing)} of the {count} parameters of "
            f"{type(model).__name__}, such as {', '.join(lacking[:3])}; what it holds is "
            f"named {', '.join(names[:3]) or 'nothing'}. They would be trained from scratch: give "
            "the weights of this architecture under its own names and the config.json that belongs "
            "to them, or choose a size of model/ to begin from scratch"
        )
    if missing:
        logger.warning("not in the checkpoint, initialised from scratch: %s", ", ".join(missing))


def _shortened(files: Sequence[str]) -> str:
    return files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")


_COMPARED = 2**24
"""How many elements of two tensors are compared at once."""


class _Checkpoint:
    """Files of tensors: names, shapes and kinds at once, values one by one.

    Names are those of the model that was saved, without what was wrapped around it.
    """

    def __init__(self, files: Sequence[str], expected: set[str]) -> None:
        self.files = files
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
                self._mapped |= _mapped(file)
        for key, tensor in self._mapped.items():
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            self.empty[key] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        self._raw = self._own_names(expected)
        self.empty = {name: self.empty[raw] for name, raw in self._raw.items()}

    def _own_names(self, expected: set[str]) -> dict[str, str]:
        """Return the names in the files by the model's own."""
        plain = unwrapped(self.empty)
        as_they_are = sum(1 for name in plain if name in expected)
        if as_they_are > sum(1 for name in plain.values() if name in expected):
            return {raw: raw for raw in plain}
        return {name: raw for raw, name in plain.items()}

    def read(self, made: Traced, out: torch.Tensor, start: int = 0) -> None:
        """Write those elements that a tensor is made of from its ``start``-th on."""
        flat, end = out.view(-1), 0
        stop = start + flat.numel()
        # Each tensor of the files is opened once, however its elements lie among those of others.
        parts: dict[str, list[tuple[int, int, int]]] = {}
        for name, begin, length in made.pieces:
            first, end = end, end + length
            if end <= start:
                continue
            if first >= stop:
                break
            skipped = max(0, start - first)
            taken = min(end, stop) - first - skipped
            parts.setdefault(name, []).append((begin + skipped, taken, first + skipped - start))
        for name, of_it in parts.items():
            span = min(begin for begin, _, _ in of_it), max(b + length for b, length, _ in of_it)
            with self._opened(name, *span) as (elements, offset):
                for begin, length, at in of_it:
                    # Copied: the elements are the file's own pages, which may be written anew.
                    source = elements[begin - offset : begin - offset + length]
                    flat[at : at + length].copy_(source)

    @contextmanager
    def _opened(self, name: str, start: int, stop: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Give the flattened rows with the elements from start to stop, and where they begin.

        They are mapped: of the file no more is read than what is copied out of them.
        """
        raw, shape = self._raw[name], self.empty[name].shape
        if raw in self._mapped:
            yield self._mapped[raw].reshape(-1), 0
            return
        # Opened anew, or all that was read before would stay mapped and count as used memory.
        with safe_open(self._file[raw], framework="pt") as tensors:
            if not shape:  # safetensors cuts no number
                yield tensors.get_tensor(raw).reshape(-1), 0
                return
            width = max(1, math.prod(shape[1:]))
            first, last = start // width, -(-stop // width)
            yield tensors.get_slice(raw)[first:last].reshape(-1), first * width

    def holds_equal(self, one: Traced, other: Traced) -> bool:
        """Return whether two tensors have the same elements, reading no further than they have."""
        if one.shape != other.shape or one.pieces == other.pieces:
            return one.shape == other.shape
        blocks = torch.empty(2, min(_COMPARED, one.numel()), dtype=one.dtype)
        for start in range(0, one.numel(), _COMPARED):
            mine, theirs = blocks[:, : one.numel() - start]
            self.read(one, mine, start)
            self.read(other, theirs, start)
            if not torch.equal(mine, theirs):
                return False
        return True

    def whole(self, made: Traced) -> torch.Tensor:
        tensor = torch.empty(made.shape, dtype=made.dtype)
        self.read(made, tensor)
        return tensor


@dataclass(frozen=True)
class _InFiles(InitialValue):
    """A value in a checkpoint's files, of which no more is read than is asked for."""

    checkpoint: _Checkpoint
    made: Traced

    def write(self, out: torch.Tensor, start: int = 0) -> None:
        self.checkpoint.read(self.made, out, start)


def _mapped(file: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of torch.save, at its top or under the name of a model."""
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CannotStream(f"{file} cannot be mapped: {error}") from None
    tensors = read_plain.weights_in(found, Path(file))
    return {str(key): value for key, value in tensors.items() if isinstance(value, torch.Tensor)}


def _made_of(model: PreTrainedModel, checkpoint: _Checkpoint) -> Mapping[str, Traced]:
    """Return of which of the checkpoint's elements each parameter and buffer of the model is."""
    try:
        made = loaded(model, checkpoint.empty, ignore_mismatched_sizes=True)
    except CannotTrace as error:
        raise CannotStream(
            f"transformers makes a tensor of {type(model).__name__} out of those of its files in "
            f"a way that is not a plain copy of elements: {error}"
        ) from None
    _check_shapes(model, made.mismatched, checkpoint.files)
    if made.computed:
        raise CannotStream(f"{made.computed[0]} is computed out of tensors of the checkpoint")
    return made.tensors


def _check_shapes(
    model: PreTrainedModel,
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    files: Sequence[str],
) -> None:
    """Raise UserError where the files have a tensor in another shape than the config gives it."""
    for name, there, wanted in mismatched:
        rows = model.config.get_text_config().vocab_size
        of_vocabulary = list(wanted)[:1] == [rows] and list(there)[1:] == list(wanted)[1:]
        remedy = (
            f"set vocab_size={there[0]} there"
            if of_vocabulary
            else "give the config.json that belongs to these weights"
        )
        raise UserError(
            f"{_shortened(files)} holds {name} in the shape {tuple(there)}, and its config.json "
            f"makes it {tuple(wanted)}; {remedy}, or choose another model"
        )


def _untie_what_differs(
    model: PreTrainedModel, found: Mapping[str, Traced], checkpoint: _Checkpoint
) -> None:
    """Untie, as `from_pretrained` does, what the checkpoint has under both names and unequal."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target not in found or source not in found:
            continue
        if checkpoint.holds_equal(found[target], found[source]):
            continue
        untie(model, target)
        logger.warning("%s and %s differ in the checkpoint and are not tied", target, source)


def untie(model: PreTrainedModel, target: str) -> None:
    """Give a tied parameter's second name a parameter of its own."""
    parent, _, attribute = target.rpartition(".")
    tied = model.get_parameter(target)
    own = nn.Parameter(tied.detach(), tied.requires_grad)
    setattr(model.get_submodule(parent), attribute, own)
    del model.all_tied_weights_keys[target]
