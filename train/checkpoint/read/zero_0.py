"""DeepSpeed checkpoints of stage 0 as portable state: whole masters, which name no parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from shardwright.train.checkpoint.format.layout import PARAMETER_ORDER
from shardwright.train.checkpoint.format.lazy import (
    Fragment,
    LazyTensor,
    PortableState,
    Unreadable,
    flat,
    lazy,
    part,
)
from shardwright.train.checkpoint.read.model_states import ModelStates


def read(states: ModelStates) -> PortableState:
    """Return what the model file of stage 0 holds. Raises Unreadable.

    Where the optimizer keeps masters, they are told by the order beside them, or by their shapes
    and values.
    """
    path, optimizer = states.path, states.values["optimizer"]
    weights = states.frozen()  # of the optimizer's parameters this file names none
    kept = _kept(weights)
    order = _order(states)
    if groups := _groups(optimizer, states):
        stored = {n: weights[n] for n, first in kept.items() if n == first and weights[n].numel}
        masters = _matched(groups, stored) if order is None else _ordered(groups, stored, order)
        weights |= {name: masters[first] for name, first in kept.items() if first in masters}
    moments: dict[str, dict[str, LazyTensor]] = {}
    scalars: dict[str, dict[str, float]] = {}
    if optimizer is not None and order is not None:
        inner = optimizer.get("optimizer_state_dict", optimizer)
        for name, kind, value in _entries(inner["state"], order):
            if value.ndim:
                moments.setdefault(name, {})[kind] = lazy(value, path)
            else:
                scalars.setdefault(name, {})[kind] = float(lazy(value, path).read())
    return PortableState(
        weights,
        moments,
        scalars,
        buffers=states.buffers(),
        origin="DeepSpeed without ZeRO (stage 0)",
        step=states.step,
    )


def _kept(weights: Mapping[str, LazyTensor]) -> dict[str, str]:
    """Return the first name of each weight; tied ones lie at one place of the file."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault((tensor.fragments, tensor.shape), name) if tensor.numel else name
        for name, tensor in weights.items()
    }


def _order(states: ModelStates) -> list[str] | None:
    path = states.path.parent / PARAMETER_ORDER
    if not path.is_file():
        return None
    order = json.loads(path.read_bytes())
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        raise Unreadable(f"{path} is not a list of names")
    return order


def _entries(
    state: Mapping[int, Mapping[str, Any]], order: Sequence[str]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    for index, entries in state.items():
        for kind, value in entries.items():
            if isinstance(value, torch.Tensor):
                yield order[index], kind, value


# --- masters ------------------------------------------------------------------------------------


class _Group(Protocol):
    """The masters of one of the optimizer's groups, in its order."""

    @property
    def end(self) -> int:
        """The position after the last one."""

    def at(self, position: int, shape: tuple[int, ...]) -> tuple[LazyTensor, int] | None:
        """Return the master of a shape at a position, and the next position."""


@dataclass(frozen=True)
class _Whole:
    """Positions count tensors."""

    tensors: Sequence[LazyTensor]

    @property
    def end(self) -> int:
        return len(self.tensors)

    def at(self, position: int, shape: tuple[int, ...]) -> tuple[LazyTensor, int] | None:
        if position < self.end and self.tensors[position].shape == shape:
            return self.tensors[position], position + 1
        return None


@dataclass(frozen=True)
class _Flat:
    """Positions count elements of all tensors laid end to end."""

    fragment: Fragment
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.fragment.length

    def at(self, position: int, shape: tuple[int, ...]) -> tuple[LazyTensor, int] | None:
        after = position + math.prod(shape)
        if after > self.end:
            return None
        piece = part(self.fragment, self.dtype.itemsize, position, after - position, 0)
        return LazyTensor(shape, self.dtype, (piece,)), after


def _groups(optimizer: Any, states: ModelStates) -> list[_Group]:
    """Return the masters that an optimizer of 16-bit weights keeps; none where there are none."""
    path = states.path
    if optimizer is None:
        return []
    if "single_partition_of_fp32_groups" in optimizer:
        raise Unreadable(f"{path} holds partitions of masters and no shapes to cut them by")
    if "fp32_groups" in optimizer:
        return [_Whole([lazy(t, path) for t in group]) for group in optimizer["fp32_groups"]]
    flats = optimizer.get("fp32_groups_flat", ())
    return [_Flat(flat(tensor, path), tensor.dtype) for tensor in flats]


def _ordered(
    groups: Sequence[_Group], stored: Mapping[str, LazyTensor], order: Sequence[str]
) -> dict[str, LazyTensor]:
    """Return masters by name, where the order is known."""
    found: dict[str, LazyTensor] = {}
    names = iter(order)
    for group in groups:
        position = 0
        while position < group.end:
            name = next(names, "")
            here = group.at(position, stored[name].shape) if name in stored else None
            if here is None:
                raise Unreadable(f"{PARAMETER_ORDER} does not fit the optimizer's weights: {name}")
            found[name], position = here
    return found


def _matched(groups: Sequence[_Group], stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return masters by name, where only the file of the model tells which is whose.

    Optimizers get parameters in the order of the model, in one group or sorted into some, and what
    is frozen not at all. All ways to do so are followed in which each master has the shape of its
    parameter and rounds to the very 16-bit weight. Raises Unreadable where there is none, or where
    there are two.
    """
    start = tuple(0 for _ in groups)
    end = tuple(group.end for group in groups)
    # By the groups' positions: one way to come there (parameter and master, and the way before),
    # and whether it is the only one.
    reached: dict[tuple[int, ...], _Way] = {start: _Way(None, "", None)}
    weights = sum(tensor.numel for tensor in stored.values())
    may_skip = weights != sum(_elements(group) for group in groups)
    for name, tensor in stored.items():
        after: dict[tuple[int, ...], _Way] = {}
        for positions, way in reached.items():
            if may_skip:
                _add(after, positions, way)
            for i, group in enumerate(groups):
                here = group.at(positions[i], tensor.shape)
                if here is not None and _rounds_to(here[0], tensor):
                    moved = (*positions[:i], here[1], *positions[i + 1 :])
                    _add(after, moved, _Way(way, name, here[0], way.is_only))
        reached = after
    if end not in reached:
        raise Unreadable(
            "the optimizer's master weights of stage 0 do not name their parameters, and no "
            f"order of the model's {len(stored)} makes each of them round to its 16-bit weight"
        )
    last: _Way | None = reached[end]
    assert last is not None
    if not last.is_only:
        raise Unreadable(
            "the optimizer's master weights of stage 0 do not name their parameters, and there "
            "is more than one way to assign them in which each rounds to a 16-bit weight of its "
            "shape"
        )
    found = {}
    while last is not None:
        if last.master is not None:
            found[last.name] = last.master
        last = last.before
    return found


@dataclass(frozen=True)
class _Way:
    """The last step of an assignment of masters to parameters, and those before it."""

    before: _Way | None
    name: str
    master: LazyTensor | None
    is_only: bool = True


def _add(reached: dict[tuple[int, ...], _Way], positions: tuple[int, ...], way: _Way) -> None:
    known = reached.get(positions)
    reached[positions] = way if known is None else replace(known, is_only=False)


def _elements(group: _Group) -> int:
    return sum(t.numel for t in group.tensors) if isinstance(group, _Whole) else group.end


_COMPARED_ELEMENTS = 2**20


def _rounds_to(master: LazyTensor, weight: LazyTensor) -> bool:
    for start in range(0, master.numel, _COMPARED_ELEMENTS):
        stop = min(master.numel, start + _COMPARED_ELEMENTS)
        rounded = master.read(start, stop).to(weight.dtype)
        # By their bits, in which a NaN equals itself.
        if not torch.equal(rounded.view(torch.uint8), weight.read(start, stop).view(torch.uint8)):
            return False
    return True
