"""DeepSpeed ZeRO checkpoints as portable state: flat partitions, cut by the shapes beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwright.train.checkpoint.format.lazy import (
    Fragment,
    LazyTensor,
    PortableState,
    Unreadable,
    describe,
    flat,
    lazy,
    part,
)
from shardwright.train.checkpoint.read import model_states
from shardwright.train.checkpoint.read import zero_0 as read_zero_0
from shardwright.train.checkpoint.read.model_states import IGNORED, ModelStates
from shardwright.train.checkpoint.read.reader import Reader
from shardwright.train.run_directory.names import ENGINE_FOLDER
from shardwright.train.units import counted

_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


@dataclass(frozen=True)
class _Shard:
    """One rank's flat tensors of one group of parameters, and where they lie."""

    masters: Fragment
    dtype: torch.dtype
    moments: Mapping[str, tuple[torch.dtype, Fragment]]
    scalars: Mapping[str, float]


def find(directory: Path) -> Path | None:
    """Return the directory where it looks like DeepSpeed's."""
    return directory if model_states.is_there(directory) else None


def read(directory: Path) -> PortableState:
    """Return what DeepSpeed's files of one checkpoint hold. Raises Unreadable."""
    states = model_states.read(directory)
    with model_states.layout_errors(directory):
        shapes = states.shapes
        return read_zero_0.read(states) if shapes is None else _sharded(states, shapes)


def _sharded(states: ModelStates, groups: Sequence[Mapping[str, tuple[int, ...]]]) -> PortableState:
    directory, ranks = states.path.parent, states.ranks
    files = _optimizer_files(directory, ranks)
    described = [describe(path, IGNORED)["optimizer_state_dict"] for path in files]
    masters = "fp32_flat_groups" if states.is_stage_3 else "single_partition_of_fp32_groups"
    shards = []
    for path, state in zip(files, described, strict=True):
        _check_partitions(path, state, ranks)
        shards.append(_shards(state, masters, path))
    _check_alike(files, shards)
    collected = _Collected()
    if states.is_stage_3:
        # Sub-groups cut the parameters of all groups, in order, wherever one is full.
        shapes = {name: shape for group in groups for name, shape in group.items()}
        _stage_3(shapes, shards, files, collected)
    else:
        paddings = described[0].get("param_alignment_paddings")
        _stages_1_and_2(groups, shards, files, paddings, collected)
    stage = _stage(described[0]) if not states.is_stage_3 else 3
    return collected.state(states, f"DeepSpeed ZeRO stage {stage}, {_counted(ranks)}")


def _counted(ranks: int) -> str:
    return f"{counted(ranks, 'rank')}"


def _stage(state: Mapping[str, Any]) -> int:
    # An enumeration, whose class is not run; the optimizer of bf16 at stage 1 writes none.
    stage = state.get("zero_stage", 1)
    return int(stage.arguments[0]) if hasattr(stage, "arguments") else int(stage)


def _optimizer_files(directory: Path, ranks: int) -> list[Path]:
    found: dict[int, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        if match := _OPTIMIZER_FILE.fullmatch(path.name):
            found.setdefault(int(match[2]), []).append(path)
    if missing := sorted(set(range(ranks)) - set(found)):
        raise Unreadable(
            f"{directory} was written by {_counted(ranks)}, and the optimizer states of rank(s) "
            f"{', '.join(map(str, missing))} are missing"
        )
    if more := sorted(set(found) - set(range(ranks))):
        raise Unreadable(
            f"{directory} was written by {_counted(ranks)}, and holds the optimizer states of "
            f"rank(s) {', '.join(map(str, more))} too, of a checkpoint of another world size"
        )
    if twice := [paths for paths in found.values() if len(paths) > 1]:
        names = " and ".join(path.name for path in twice[0])
        raise Unreadable(f"{directory} holds {names}, of two checkpoints")
    return [found[rank][0] for rank in range(ranks)]


def _check_partitions(path: Path, state: Mapping[str, Any], ranks: int) -> None:
    count = state.get("partition_count", ranks)
    counts = set(count if isinstance(count, list | tuple) else [count])
    if counts - {ranks}:
        raise Unreadable(
            f"{path} is cut for {max(counts)} ranks, and the model's file was written by {ranks}"
        )


def _check_alike(files: Sequence[Path], shards: Sequence[Sequence[_Shard]]) -> None:
    """Raise Unreadable where the files of some ranks are not of one save."""
    for path, of_rank in zip(files, shards, strict=True):
        if len(of_rank) != len(shards[0]):
            raise Unreadable(
                f"{path} holds {len(of_rank)} groups of weights, and {files[0].name} "
                f"{len(shards[0])}; they are of two checkpoints"
            )
        for mine, first in zip(of_rank, shards[0], strict=True):
            steps = mine.scalars.get("step"), first.scalars.get("step")
            if steps[0] != steps[1]:
                raise Unreadable(
                    f"{path} is of the optimizer's step {steps[0]}, and {files[0].name} of "
                    f"{steps[1]}; they are of two checkpoints"
                )


def _shards(state: Mapping[str, Any], masters: str, path: Path) -> list[_Shard]:
    inner = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or {}
    per_group = inner.get("state", {}) if isinstance(inner, Mapping) else dict(enumerate(inner))
    found = []
    for group, tensor in enumerate(state[masters]):
        moments, scalars = {}, {}
        for kind, value in per_group.get(group, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim:
                # Others, such as the scales of 8-bit ones, do not lie beside the weights.
                if value.numel() >= tensor.numel():
                    moments[kind] = (value.dtype, flat(value, path))
            elif isinstance(value, torch.Tensor):
                scalars[kind] = float(lazy(value, path).read())
            elif isinstance(value, int | float):
                scalars[kind] = float(value)
        found.append(_Shard(flat(tensor, path), tensor.dtype, moments, scalars))
    return found


def _stages_1_and_2(
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    shards: Sequence[Sequence[_Shard]],
    files: Sequence[Path],
    paddings: Sequence[Sequence[int]] | None,
    collected: _Collected,
) -> None:
    """Cut each group's partitions, laid end to end, by the shapes of its parameters.

    ``paddings`` are the elements that follow each parameter, where they are aligned.
    """
    for index, group in enumerate(groups):
        of_group = [rank[index] for rank in shards]
        padded = [0] * len(group) if paddings is None else paddings[index]
        wanted = sum(map(math.prod, group.values())) + sum(padded)
        # Some versions pad the whole to twice the ranks, some take the padding off again.
        held, align = sum(shard.masters.length for shard in of_group), 2 * len(files)
        if -(-wanted // align) != -(-held // align):
            raise Unreadable(
                f"{files[0].parent} holds {held} elements of group {index}, whose parameters have "
                f"{wanted}; its files are of two checkpoints"
            )
        start = 0
        for (name, shape), padding in zip(group.items(), padded, strict=True):
            length = math.prod(shape)
            pieces: list[tuple[_Shard, int, int, int]] = []
            offset = 0
            for shard in of_group:
                first = max(start, offset)
                last = min(start + length, offset + shard.masters.length)
                if first < last:
                    pieces.append((shard, first - offset, last - first, first - start))
                offset += shard.masters.length
            collected.add(name, shape, pieces)
            start += length + padding


def _stage_3(
    shapes: Mapping[str, tuple[int, ...]],
    shards: Sequence[Sequence[_Shard]],
    files: Sequence[Path],
    collected: _Collected,
) -> None:
    """Each rank has ceil(elements / ranks) of every parameter, the last ones padded."""
    ranks = len(shards)
    wanted = sum(-(-math.prod(shape) // ranks) for shape in shapes.values())
    for path, of_rank in zip(files, shards, strict=True):
        held = sum(shard.masters.length for shard in of_rank)
        if held < wanted and (held == 0 or (path.parent / "offloaded_tensors").is_dir()):
            raise Unreadable(
                f"{path} holds {held} of {wanted} elements of master weights: the others were "
                "offloaded to NVMe, and DeepSpeed's copies of its swap files are not read; load "
                "the checkpoint into DeepSpeed and save it without such offload"
            )
        if held != wanted:
            raise Unreadable(
                f"{path} holds {held} elements of master weights, where a rank's part of the "
                f"model's shapes has {wanted}; its files are of two checkpoints"
            )
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

        dtype = pieces[0][0].dtype if pieces else torch.float32
        if any(shard.dtype != dtype for shard, *_ in pieces):
            raise Unreadable(f"the ranks hold {name} in different dtypes")
        self._weights[name] = tensor(
            dtype, [(shard.masters, begin, n, at) for shard, begin, n, at in pieces]
        )
        if not pieces:
            return
        kinds = pieces[0][0].moments
        self._moments[name] = {
            kind: tensor(dtype, [(s.moments[kind][1], begin, n, at) for s, begin, n, at in pieces])
            for kind, (dtype, _) in kinds.items()
        }
        self._scalars[name] = pieces[0][0].scalars

    def state(self, states: ModelStates, origin: str) -> PortableState:
        """Return it together with what the model's file has besides."""
        weights = {**states.frozen(), **self._weights}
        weights |= {n: weights[kept] for n, kept in states.tied().items() if kept in weights}
        return PortableState(
            weights,
            self._moments,
            self._scalars,
            buffers=states.buffers(),
            origin=origin,
            step=states.step,
        )


READER = Reader(
    f"DeepSpeed's *_model_states.pt (there, in {ENGINE_FOLDER}/ or in the folder that a file "
    "called latest names)",
    find,
    read,
    is_an_engines=True,
)
