"""The average of a run's weights in a checkpoint: a file of each rank's part, read when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from shardwright.train.checkpoint.format.lazy import (
    Fragment,
    LazyTensor,
    Unreadable,
    describe,
    lazy,
)
from shardwright.train.run_directory.names import ENGINE_FOLDER

_FILE = "average-{rank}.pt"


def file_of(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint."""
    return f"{ENGINE_FOLDER}/{_FILE.format(rank=rank)}"


def key_of(name: str, start: int) -> str:
    """Return what a file calls elements of a flattened parameter that begin there."""
    return f"{start}:{name}"


def files_in(folder: Path) -> list[Path]:
    """Return the files of all ranks in an engine's folder; none where no average was kept."""
    return sorted(folder.glob(_FILE.format(rank="*")))


def parts_in(path: Path) -> dict[str, LazyTensor]:
    """Return the parts in one rank's file by their keys. Raises Unreadable."""
    found = describe(path)
    if not isinstance(found, Mapping):
        raise Unreadable(f"{path} holds no mapping of tensors")
    return {str(k): lazy(t, path) for k, t in found.items() if isinstance(t, torch.Tensor)}


class Averages(Mapping[str, LazyTensor]):
    """The averages by parameter name. Their files are opened where they are first asked for."""

    def __init__(self, folder: Path, shape_of: Callable[[str], tuple[int, ...]]) -> None:
        self._files, self._shape_of = files_in(folder), shape_of

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __bool__(self) -> bool:
        return bool(self._files)

    @cached_property
    def _tensors(self) -> dict[str, LazyTensor]:
        fragments: dict[str, list[Fragment]] = {}
        for path in self._files:
            for key, part in parts_in(path).items():
                start, _, name = key.partition(":")
                if part.dtype != torch.float32 or not start.isdecimal():
                    raise Unreadable(f"{path} holds {key} in {part.dtype}: no part of an average")
                placed = part.cut(0, part.numel, int(start))
                fragments.setdefault(name, []).extend(placed)
        return {name: self._joined(name, parts) for name, parts in fragments.items()}

    def _joined(self, name: str, parts: list[Fragment]) -> LazyTensor:
        ordered = tuple(sorted(parts, key=lambda part: part.start))
        try:
            return LazyTensor(self._shape_of(name), torch.float32, ordered)
        except KeyError:
            raise Unreadable(f"the checkpoint has an average of {name} and no weight") from None
