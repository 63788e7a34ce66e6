"""DeepSpeed's universal checkpoints as portable state: a folder of whole tensors per parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shardwright.train.checkpoint.format.lazy import (
    LazyTensor,
    PortableState,
    Unreadable,
    describe,
    flat,
    lazy,
)
from shardwright.train.checkpoint.read import model_states
from shardwright.train.checkpoint.read.model_states import IGNORED, ModelStates
from shardwright.train.checkpoint.read.reader import Reader

FOLDER = "zero"
MASTER = "fp32.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def find(directory: Path) -> Path | None:
    """Return the directory where it looks like what ds_to_universal makes."""
    return directory if any((directory / FOLDER).glob(f"*/{MASTER}")) else None


def read(directory: Path) -> PortableState:
    """Return what a universal checkpoint holds. Raises Unreadable."""
    states = model_states.read(directory, of_model_parallelism=True)
    with model_states.layout_errors(directory):
        return _state(directory, states)


def _state(directory: Path, states: ModelStates) -> PortableState:
    shapes = {name: shape for group in states.shapes or [] for name, shape in group.items()}
    is_split = any(directory.glob("*mp_rank_01*_model_states.pt"))
    weights: dict[str, LazyTensor] = {}
    moments: dict[str, dict[str, LazyTensor]] = {}
    scalars: dict[str, dict[str, float]] = {}
    for folder in _folders(directory):
        name = folder.name
        if name not in shapes and not is_split:
            # Of stages 1 and 2 it holds all else of the model too, cast to fp32: that is read
            # below as it was.
            continue
        weights[name] = _tensor(folder / MASTER, shapes.get(name))
        for kind in _MOMENTS:
            if (path := folder / f"{kind}.pt").is_file():
                moments.setdefault(name, {})[kind] = _tensor(path, weights[name].shape)
        step = _step(folder / "step.pt")
        if step is not None:
            scalars[name] = {"step": step}
    if missing := sorted(shapes.keys() - weights.keys()):
        raise Unreadable(
            f"{directory / FOLDER} has no {missing[0]}/{MASTER}, nor those of {len(missing) - 1} "
            "more parameters"
        )
    # What a rank of model parallelism has is parts, and nothing says how they belong together.
    frozen = {} if is_split else states.frozen()
    weights |= {name: tensor for name, tensor in frozen.items() if name not in weights}
    weights |= {n: weights[kept] for n, kept in states.tied().items() if kept in weights}
    return PortableState(
        weights,
        moments,
        scalars,
        buffers={} if is_split else states.buffers(),
        origin="universal checkpoint",
        step=states.step,
    )


def _folders(directory: Path) -> Iterator[Path]:
    """Yield the folder of each parameter, once it is sure to lie inside."""
    root = directory.resolve()
    for path in sorted((directory / FOLDER).glob(f"*/{MASTER}")):
        if not path.resolve().is_relative_to(root):
            raise Unreadable(f"{path} is a link that points out of {directory}")
        yield path.parent


def _tensor(path: Path, shape: tuple[int, ...] | None) -> LazyTensor:
    """Return a whole tensor; of stage 3 it is flat, and ``shape`` is what it is to have.

    Those of stages 1 and 2 stand under "param", beside notes on how they were put together
    (cat_dim, sub_param_shape), which the tensor follows already. One of a padded vocabulary
    ("vocab_tensor") has lost the padding, and its own shape is the one that counts.
    """
    found: Any = describe(path, IGNORED)
    described = found["param"] if isinstance(found, Mapping) else found
    if not isinstance(described, torch.Tensor):
        raise Unreadable(f"{path} holds a {type(described).__name__}, not a tensor")
    if isinstance(found, Mapping):
        return lazy(described, path)
    if shape is None:
        raise Unreadable(f"{path} is flat, and no model file beside it tells its shape")
    if described.numel() != math.prod(shape):
        raise Unreadable(
            f"{path} holds {described.numel()} elements, where {shape} has {math.prod(shape)}"
        )
    return LazyTensor(shape, described.dtype, (flat(described, path),))


def _step(path: Path) -> float | None:
    if not path.is_file():
        return None
    found = describe(path, IGNORED)
    if isinstance(found, torch.Tensor):
        return float(lazy(found, path).read())
    return float(found)


READER = Reader(
    f"a universal checkpoint's {FOLDER}/*/{MASTER}",
    find,
    read,
    is_an_engines=True,
)
