"""What a checkpoint holds as the first values of a model: no rank reads more than it is to hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.format.lazy import LazyTensor, PortableState, Unreadable
from shardwright.train.checkpoint.read import merged, portable
from shardwright.train.errors import UserError
from shardwright.train.model import adapter_base, streaming
from shardwright.train.model.weights import InitialValue, InitialValues, initialized

logger = logging.getLogger(__name__)


NOTHING: Mapping[str, InitialValue] = {}


@dataclass(frozen=True)
class Saved:
    """The weights of a checkpoint."""

    checkpoint: Path
    state: PortableState
    parameters: Collection[str]
    """The first name of each, as its manifest says."""
    remedy: str
    """What else to do where it cannot be read."""

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Raise UserError where it is opened or read in the block and cannot be."""
        with refusing(self.checkpoint, self.remedy):
            yield


@contextmanager
def refusing(checkpoint: Path, remedy: str) -> Iterator[None]:
    """Raise UserError where a checkpoint is opened or read in the block and cannot be."""
    try:
        yield
    except Unreadable as error:
        raise UserError(f"{checkpoint} {remedy.format(error=error)}") from None


def is_checkpoint(name: str) -> bool:
    """Return whether the name of a model is a checkpoint of a run, in an engine's own files."""
    return (Path(name) / layout.MANIFEST).is_file()


def untie(model: PreTrainedModel, parameters: Collection[str]) -> None:
    """Untie what a checkpoint has as parameters of their own, as they were unequal."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in parameters and source in parameters:
            streaming.untie(model, target)


def first_values(
    model: torch.nn.Module, saved: Saved, beside: Mapping[str, InitialValue] = NOTHING
) -> InitialValues:
    """Return each parameter's master weight as its first value; set the persistent buffers.

    ``beside`` are values of what is not trained, which the checkpoint may leave out. Raises
    UserError where it holds another model.
    """
    found = saved.state.weights
    left_out = {
        name
        for name, parameter in model.named_parameters()
        if name not in found and name in beside and not parameter.requires_grad
    }
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        kept = saved.state.buffers.get(name, found.get(name))
        if name in persistent and kept is not None and kept.shape == tuple(buffer.shape):
            with saved.refusing():
                buffer.copy_(kept.whole())
    problems = []
    for name, parameter in model.named_parameters():
        if name in left_out:
            continue
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name].shape != tuple(parameter.shape):
            problems.append(f"{name} has shape {found[name].shape}, not {tuple(parameter.shape)}")
    if problems:
        raise UserError(
            f"{saved.checkpoint} holds another model than the config describes: "
            f"{'; '.join(problems[:3])}{' and more' if len(problems) > 3 else ''}"
        )
    names = [name for name, _ in model.named_parameters()]
    return {n: beside[n] if n in left_out else SavedValue(found[n], saved) for n in names}


@dataclass(frozen=True)
class SavedValue(InitialValue):
    """A value in a checkpoint, of which no more is read than is asked for."""

    tensor: LazyTensor
    of: Saved

    def write(self, out: torch.Tensor, start: int = 0) -> None:
        flat = out.view(-1)
        stop = start + flat.numel()
        with self.of.refusing():
            if self.tensor.dtype == flat.dtype:
                self.tensor.read(start, stop, flat.view(torch.uint8))
            else:
                flat.copy_(self.tensor.read(start, stop))


def of_another_run(
    build: Callable[[], PreTrainedModel], checkpoint: Path, seed: int
) -> tuple[PreTrainedModel, InitialValues]:
    """Return a model on the meta device, and its values in the checkpoint of another run."""
    remedy = "cannot be read: {error}; give another checkpoint of that run, or its final/"
    with refusing(checkpoint, remedy):
        state = portable.read(checkpoint)
    manifest = layout.read_manifest(checkpoint)
    if manifest.average is not None and manifest.average.replaces_weights:
        # What is trained is not what was learned, where the optimizer averages by itself.
        with refusing(checkpoint, remedy):
            state = replace(state, weights=dict(state.ema))
    names: Collection[str] = {parameter.name for parameter in manifest.parameters}
    model, _ = initialized(build, seed)
    state = adapter_base.completed(state, manifest, model, checkpoint)
    if manifest.adapter is not None:
        state = merged.merged(state, manifest.adapter)
        names = state.weights.keys()
    untie(model, names)
    return model, first_values(model, Saved(checkpoint, state, (), remedy))
