"""The base of an adapter whose checkpoints leave it out: known by a hash of its values, read again.

Where the base is quantised for training, a checkpoint holds what is trained alone. The values that
the base was quantised from lie where they lay: each of them is read from there when it is needed.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import extract_commit_hash

from shardwright.train.checkpoint.format import damage
from shardwright.train.checkpoint.format.layout import BaseEntry, Manifest
from shardwright.train.checkpoint.format.lazy import Fragment, LazyTensor, PortableState, Unreadable
from shardwright.train.checkpoint.read.merged import whole
from shardwright.train.config import PretrainedModel, RunConfig
from shardwright.train.errors import UserError
from shardwright.train.model.directory import own_class
from shardwright.train.model.streaming import CannotStream, streamed, weight_files
from shardwright.train.model.weights import InitialValue, InitialValues

_READ_ELEMENTS = 2**20
"""How many elements are hashed at once."""


def left_out(model: nn.Module) -> dict[str, str]:
    """Return what of a model with an adapter is its base's, by the names that the base has.

    Copies of modules that are trained whole are not: nothing is computed of them.
    """
    names = ((whole(name), name) for name, p in model.named_parameters() if not p.requires_grad)
    return {plain: name for plain, name in names if plain is not None}


def frozen_names(model: nn.Module) -> set[str]:
    """Return each name of each parameter that is not trained: tied ones have several."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


class Digest:
    """A hash of a base's values in fp32 and of their names, in whatever order they come."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Take in all of a tensor by the name that the base has for it."""
        flat = values.detach().reshape(-1).float().cpu().contiguous()
        self._of[name] = xxhash.xxh3_128_hexdigest(_bytes(flat))

    def add_read(self, name: str, value: InitialValue, elements: int) -> None:
        """Do the same a part at a time."""
        digest = xxhash.xxh3_128()
        step = max(1, elements) if value.comes_whole else _READ_ELEMENTS
        buffer = torch.empty(min(step, elements))
        for start in range(0, elements, step):
            part = buffer[: min(step, elements - start)]
            value.write(part, start)
            digest.update(_bytes(part))
        self._of[name] = digest.hexdigest()

    def hexdigest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self._of, sort_keys=True).encode())


def _bytes(values: torch.Tensor) -> memoryview:
    found: memoryview = values.view(torch.uint8).numpy().data
    return found


def note_revision(model: nn.Module, files: Sequence[str]) -> None:
    """Note on a model the commit of the hub that the files of its weights are of, if any."""
    model._weights_revision = extract_commit_hash(files[0], None)  # type: ignore[assignment]


def entry(config: RunConfig, model: nn.Module, digest: str) -> BaseEntry:
    """Return what a checkpoint says of the base that it leaves out."""
    section = config.model
    assert isinstance(section, PretrainedModel)
    directory = Path(section.name)
    name = str(directory.resolve()) if directory.is_dir() else section.name
    # A branch may lead to other weights by the time that they are read again.
    revision: str | None = getattr(model, "_weights_revision", None) or section.revision
    return BaseEntry(name=name, revision=revision, seed=config.seed, digest=digest)


def as_it_was(config: RunConfig, left_out: BaseEntry | None) -> RunConfig:
    """Return a config that names the commit of its model that a checkpoint was written beside."""
    section = config.model
    if left_out is None or not isinstance(section, PretrainedModel) or left_out.revision is None:
        return config
    model = section.model_copy(update={"revision": left_out.revision})
    return config.model_copy(update={"model": model})


def check(found: str, expected: BaseEntry, checkpoint: Path) -> None:
    """Raise UserError where the base is not the one that a checkpoint was written beside."""
    if found != expected.digest:
        raise UserError(
            f"{checkpoint} holds an adapter alone, and the weights of {expected.name} are not "
            "those that it was trained beside: their values have another hash. Give those again: "
            "under the same name, or to `shardwright recover` by --base"
        )


def completed(
    state: PortableState,
    manifest: Manifest,
    model: PreTrainedModel,
    checkpoint: Path,
    place: Path | None = None,
    *,
    checks: bool = True,
) -> PortableState:
    """Return the state of a checkpoint with the weights of its base, if it leaves those out.

    ``model`` is of the base's class and config, with an adapter or without. The base lies at
    ``place``, by default where it lay. Raises UserError where it is not to be had, and with
    ``checks``, for which all of it is read once, where it is another one.
    """
    if manifest.base is None:
        return state
    of_base = manifest.base
    with _reading(of_base if place is None else replace_name(of_base, place), checkpoint) as source:
        shapes, values = _values(source, model)
    weights, digest = dict(state.weights), Digest()
    for name in (parameter.name for parameter in manifest.parameters):
        plain = whole(name)
        if name in weights or plain is None:
            continue
        if plain not in values:
            raise UserError(
                f"{checkpoint} was trained beside a model that has {plain}, and {source.name} has "
                "no weights of that name; give the model that it was trained beside"
            )
        weights[name] = OfBase(shapes[plain], torch.float32, (), values[plain])
        if checks:
            digest.add_read(plain, values[plain], math.prod(shapes[plain]))
    if checks:
        check(digest.hexdigest(), of_base.model_copy(update={"name": source.name}), checkpoint)
    return replace(state, weights=weights)


def replace_name(of_base: BaseEntry, place: Path) -> BaseEntry:
    """Return the same base where it lies now. Pure."""
    return of_base.model_copy(update={"name": str(place), "revision": None})


@contextmanager
def _reading(source: BaseEntry, checkpoint: Path) -> Iterator[BaseEntry]:
    """Raise UserError where the base cannot be read in the block."""
    try:
        yield source
    except UserError:
        raise
    except (OSError, ValueError, CannotStream) as error:
        raise UserError(
            f"{checkpoint} holds an adapter alone, and the weights of {source.name}, which it was "
            f"trained beside, cannot be read ({damage.in_one_line(error)}); bring them back, or "
            "give `shardwright recover` the directory that holds them by --base, or --adapter to "
            "take the adapter alone"
        ) from None


def _values(
    source: BaseEntry, model: PreTrainedModel
) -> tuple[Mapping[str, tuple[int, ...]], InitialValues]:
    """Return shape and value of each parameter of the base."""
    if Path(source.name).is_absolute() and not Path(source.name).is_dir():
        raise FileNotFoundError("there is no such directory")
    build: Callable[[], PreTrainedModel] = lambda: own_class(model)(copy.deepcopy(model.config))  # noqa: E731
    files = weight_files(source.name, source.revision, model.config)
    built, values = streamed(build, files, source.seed)
    return {name: tuple(p.shape) for name, p in built.named_parameters()}, values


@dataclass(frozen=True)
class OfBase(LazyTensor):
    """A weight of the base, in fp32, that is read where the base lies."""

    value: InitialValue

    def __post_init__(self) -> None:
        """It is not made of fragments."""

    def read(
        self, start: int = 0, stop: int | None = None, buffer: torch.Tensor | None = None
    ) -> torch.Tensor:
        stop = self.numel if stop is None else stop
        if buffer is None:
            result = torch.empty(stop - start)
        else:
            result = buffer[: (stop - start) * 4].view(torch.float32)
        if self.value.comes_whole:
            whole_value = torch.empty(self.numel)
            self.value.write(whole_value)
            result.copy_(whole_value[start:stop])
        elif result.numel():
            self.value.write(result, start)
        return result

    def cut(self, start: int, length: int, at: int) -> Iterator[Fragment]:
        raise Unreadable("a weight of a base lies in no file of the checkpoint")
