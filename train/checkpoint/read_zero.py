"""DeepSpeed ZeRO checkpoints, stages 0 to 3, as portable state."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.lazy import (
    Fragment,
    LazyTensor,
    PortableState,
    Unreadable,
    describe,
    flat,
    lazy,
    part,
)

PARAMETER_ORDER = "parameter_order.json"
"""Beside a checkpoint of stage 0: names in the order in which the optimizer counts them."""

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL_FILE = "mp_rank_00_model_states.pt"
_MODEL_FILE_OF_STAGE_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"

# Classes of deepspeed 0.19 that its files name, whose values are not needed.
_IGNORED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


@dataclass(frozen=True)
class _Shard:
    """One rank's flat tensors of one group of parameters, and where they lie."""

    masters: Fragment
    moments: Mapping[str, tuple[torch.dtype, Fragment]]
    scalars: Mapping[str, float]


def is_zero(directory: Path) -> bool:
    """Whether a directory looks like DeepSpeed's."""
    names = (_MODEL_FILE, _MODEL_FILE_OF_STAGE_3)
    return any((directory / name).is_file() for name in names)


def read(directory: Path) -> PortableState:
    """Return what DeepSpeed's files of one checkpoint hold. Raises Unreadable."""
    whole = (directory / _MODEL_FILE).is_file()
    path = directory / (_MODEL_FILE if whole else _MODEL_FILE_OF_STAGE_3)
    if not path.is_file():
        raise Unreadable(f"{directory} holds no {path.name}")
    model = describe(path, _IGNORED)
    try:
        if model.get("param_shapes") is None:
            return _stage_0(model, path)
        return _sharded(model, directory, stage_3=not whole)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise Unreadable(
            f"{directory} is not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: "
            f"{error})"
        ) from None


# --- stages 1 to 3: flat partitions -------------------------------------------------------------


def _sharded(model: Mapping[str, Any], directory: Path, *, stage_3: bool) -> PortableState:
    files = {
        int(match[1]): path
        for path in directory.iterdir()
        if (match := _OPTIMIZER_FILE.fullmatch(path.name))
    }
    ranks = int(model["dp_world_size"])
    if missing := sorted(set(range(ranks)) - set(files)):
        raise Unreadable(
            f"{directory} was written by {ranks} ranks, and the optimizer states of rank(s) "
            f"{', '.join(map(str, missing))} are missing"
        )
    states = [describe(files[rank], _IGNORED)["optimizer_state_dict"] for rank in range(ranks)]
    groups = model["param_shapes"]
    groups = groups if isinstance(groups, list) else [groups]
    masters = "fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"
    shards = [_shards(state, masters, files[rank]) for rank, state in enumerate(states)]
    if stage_3:
        # Sub-groups cut the parameters of all groups, in order, wherever one is full.
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        return _stage_3(shapes, shards)
    return _stages_1_and_2(groups, shards)


def _shards(state: Mapping[str, Any], masters: str, path: Path) -> list[_Shard]:
    inner = state.get("base_optimizer_state") or state["optimizer_state_dict"]
    per_group = inner["state"] if isinstance(inner, Mapping) else inner
    found = []
    for group, tensor in enumerate(state[masters]):
        entries = per_group.get(group, {}) if isinstance(per_group, Mapping) else per_group[group]
        moments, scalars = {}, {}
        for kind, value in entries.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                moments[kind] = (value.dtype, flat(value, path))
            elif isinstance(value, torch.Tensor):
                scalars[kind] = float(lazy(value, path).read())
            elif isinstance(value, int | float):
                scalars[kind] = float(value)
        found.append(_Shard(flat(tensor, path), moments, scalars))
    return found


def _stages_1_and_2(
    groups: Sequence[Mapping[str, Any]], shards: Sequence[Sequence[_Shard]]
) -> PortableState:
    """Cut each group's partitions, laid end to end, by the shapes of its parameters."""
    collected = _Collected()
    for index, group in enumerate(groups):
        of_group = [rank[index] for rank in shards]
        start = 0
        for name, shape in group.items():
            length = math.prod(shape)
            pieces: list[tuple[_Shard, int, int, int]] = []
            offset = 0
            for shard in of_group:
                first = max(start, offset)
                last = min(start + length, offset + shard.masters.length)
                if first < last:
                    pieces.append((shard, first - offset, last - first, first - start))
                offset += shard.masters.length
            collected.add(name, tuple(shape), pieces)
            start += length
    return collected.state()


def _stage_3(
    shapes: Mapping[str, tuple[int, ...]], shards: Sequence[Sequence[_Shard]]
) -> PortableState:
    """Each rank has ceil(elements / ranks) of every parameter, the last ones padded."""
    collected = _Collected()
    ranks = len(shards)
    sub_group, begin = 0, 0
    for name, shape in shapes.items():
        elements = math.prod(shape)
        share = -(-elements // ranks)
        while begin == shards[0][sub_group].masters.length:
            sub_group, begin = sub_group + 1, 0
        pieces = []
        for rank, of_rank in enumerate(shards):
            length = min(share, elements - rank * share)
            if length > 0:
                pieces.append((of_rank[sub_group], begin, length, rank * share))
        collected.add(name, shape, pieces)
        begin += share
    return collected.state()


class _Collected:
    """Gathers pieces of flat tensors into tensors by parameter name."""

    def __init__(self) -> None:
        self._weights: dict[str, LazyTensor] = {}
        self._moments: dict[str, dict[str, LazyTensor]] = {}
        self._scalars: dict[str, Mapping[str, float]] = {}

    def add(
        self, name: str, shape: tuple[int, ...], pieces: Sequence[tuple[_Shard, int, int, int]]
    ) -> None:
        """Add a parameter: for each piece its shard, first element there, length and place."""

        def tensor(dtype: torch.dtype, fragments: Iterable[tuple[Fragment, int, int, int]]) -> Any:
            cut = (part(f, dtype.itemsize, begin, n, at) for f, begin, n, at in fragments)
            return LazyTensor(shape, dtype, tuple(cut))

        self._weights[name] = tensor(
            torch.float32, [(shard.masters, begin, n, at) for shard, begin, n, at in pieces]
        )
        if not pieces:
            return
        kinds = pieces[0][0].moments
        self._moments[name] = {
            kind: tensor(dtype, [(s.moments[kind][1], begin, n, at) for s, begin, n, at in pieces])
            for kind, (dtype, _) in kinds.items()
        }
        self._scalars[name] = pieces[0][0].scalars

    def state(self) -> PortableState:
        return PortableState(self._weights, self._moments, self._scalars)


# --- stage 0: whole tensors ---------------------------------------------------------------------


def _stage_0(model: Mapping[str, Any], path: Path) -> PortableState:
    weights = {name: lazy(tensor, path) for name, tensor in model["module"].items()}
    optimizer = model["optimizer"]
    order_file = path.parent / PARAMETER_ORDER
    if optimizer is None or not order_file.is_file():
        return PortableState(weights, {}, {})
    order: list[str] = json.loads(order_file.read_text())
    if "fp32_groups" in optimizer:
        masters = [tensor for group in optimizer["fp32_groups"] for tensor in group]
        weights |= {n: lazy(t, path) for n, t in zip(order, masters, strict=True)}
    inner = optimizer.get("optimizer_state_dict", optimizer)
    moments: dict[str, dict[str, LazyTensor]] = {}
    scalars: dict[str, dict[str, float]] = {}
    for name, kind, value in _entries(inner["state"], order):
        if value.ndim:
            moments.setdefault(name, {})[kind] = lazy(value, path)
        else:
            scalars.setdefault(name, {})[kind] = float(lazy(value, path).read())
    return PortableState(weights, moments, scalars)


def _entries(
    state: Mapping[int, Mapping[str, Any]], order: Sequence[str]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    for index, entries in state.items():
        for kind, value in entries.items():
            if isinstance(value, torch.Tensor):
                yield order[index], kind, value
