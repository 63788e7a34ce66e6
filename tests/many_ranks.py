"""Distributed checkpoints of more ranks than there are here, of models of any size, in no space.

What is described is described by torch's own classes, as `torch.distributed.checkpoint` leaves it
of FSDP's ranks. What lies in the files is a hole, but for the chunks that a test wants to read.
"""

from __future__ import annotations

import gc
import io
import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from shardwright.train.checkpoint.format.lazy import describe, flat

Shapes = dict[str, tuple[int, ...]]


def llama(hidden: int, layers: int, inner: int, key_values: int, vocabulary: int) -> Shapes:
    """Return the parameters of a Llama, by name, in the model's own order."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (hidden, hidden),
            f"{name}.self_attn.k_proj.weight": (key_values, hidden),
            f"{name}.self_attn.v_proj.weight": (key_values, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, hidden),
            f"{name}.mlp.gate_proj.weight": (inner, hidden),
            f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner),
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


LLAMA_70B = llama(hidden=8192, layers=80, inner=28672, key_values=1024, vocabulary=128256)


@dataclass
class _File:
    """What lies in the file of one rank."""

    length: int = 0
    parts: list[tuple[int, bytes]] = field(default_factory=list)
    """What is not a hole, by where it begins."""


def write(
    directory: Path,
    shapes: Shapes,
    ranks: int,
    is_real: Callable[[str, int], bool] = lambda name, rank: False,
) -> None:
    """Write weights, moments and steps of AdamW, all zeros, as so many ranks of FSDP do.

    Only the chunks for whose name and rank ``is_real`` says so can be read, and every step.
    """
    directory.mkdir(parents=True)
    gc.disable()  # it would look through a million objects, again and again
    try:
        _write(directory, shapes, ranks, is_real)
    finally:
        gc.enable()


def _write(
    directory: Path, shapes: Shapes, ranks: int, is_real: Callable[[str, int], bool]
) -> None:
    files = [_File() for _ in range(ranks)]
    metadata = Metadata({}, {}, {}, StorageMeta(directory, "0"), "1.0.0")
    kinds = ("exp_avg", "exp_avg_sq", "step")
    for key, path, shape in [
        *((f"model.{name}", ("model", name), shape) for name, shape in shapes.items()),
        *(
            (f"optimizer.state.{n}.{k}", ("optimizer", "state", n, k), () if k == "step" else shape)
            for n, shape in shapes.items()
            for k in kinds
        ),
    ]:
        metadata.planner_data[key] = path
        _add(key, shape, metadata, files, is_real)
    for setting in ("lr", "betas", "weight_decay"):
        key = f"optimizer.param_groups.0.{setting}"
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.planner_data[key] = ("optimizer", "param_groups", 0, setting)
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__0_0.distcp", 0, 64)
    for rank, file in enumerate(files):
        with (directory / _name(rank)).open("wb") as stream:
            for start, data in file.parts:
                stream.seek(start)
                stream.write(data)
            stream.truncate(file.length)
    with (directory / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)


def _name(rank: int) -> str:
    # Each rank's own string: what it writes of itself reaches the first one in a pickle of its own.
    return f"__{rank}_0.distcp"


def _add(
    key: str,
    shape: tuple[int, ...],
    metadata: Metadata,
    files: list[_File],
    is_real: Callable[[str, int], bool],
) -> None:
    chunks = []
    names = [_name(rank) for rank in range(len(files))]
    for index, (rank, start, rows) in enumerate(_parts(key, shape, len(files))):
        sizes = (rows, *shape[1:]) if shape else ()
        offsets = (start, *(0 for _ in shape[1:])) if shape else ()
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        before, hole_bytes, after = _saved(sizes)
        file = files[rank]
        length = len(before) + hole_bytes + len(after)
        metadata.storage_data[MetadataIndex(key, offsets, index)] = _StorageInfo(
            names[rank], file.length, length
        )
        if not shape or is_real(key, rank):
            file.parts.append((file.length, before))
            file.parts.append((file.length + length - len(after), after))
        file.length += length
    properties = TensorProperties(dtype=torch.float32)
    metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, torch.Size(shape), chunks)


def _parts(key: str, shape: tuple[int, ...], ranks: int) -> Iterator[tuple[int, int, int]]:
    """Yield rank, first row and rows of each chunk, as FSDP cuts them; a number is one rank's."""
    if not shape:
        yield sum(key.encode()) % ranks, 0, 1
        return
    rows = math.ceil(shape[0] / ranks)
    for rank in range(ranks):
        start = min(rank * rows, shape[0])
        mine = min(rows, shape[0] - start)
        yield rank, start, mine
        if mine == 0:  # of those that hold nothing one is kept, as their places are the same
            return


@cache
def _saved(sizes: tuple[int, ...]) -> tuple[bytes, int, bytes]:
    """Return what `torch.save` makes of zeros: what is before them, their bytes, what is after."""
    zeros = torch.zeros(sizes)
    stream = io.BytesIO()
    torch.save(zeros, stream)
    data = stream.getvalue()
    begin = flat(describe(io.BytesIO(data)), Path()).offset_bytes if zeros.nbytes else len(data)
    assert not any(data[begin : begin + zeros.nbytes])
    return data[:begin], zeros.nbytes, data[begin + zeros.nbytes :]


def disk_bytes(directory: Path) -> int:
    """Return what the files of a directory take of the disk."""
    return sum(os.stat(path).st_blocks * 512 for path in directory.iterdir())


def rows_of(shape: tuple[int, ...], rank: int, ranks: int) -> tuple[int, int]:
    """Return the first element that a rank holds of a flattened tensor, and how many."""
    inner = math.prod(shape[1:])
    for found, start, rows in _parts("", shape, ranks):
        if found == rank:
            return start * inner, rows * inner
    return 0, 0
