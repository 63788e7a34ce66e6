"""Safetensors of several ranks, as torch's HuggingFaceStorageWriter leaves them, as one state."""

from __future__ import annotations

import json
from pathlib import Path

from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from shardwright.train.checkpoint.format.lazy import LazyTensor, PortableState, Unreadable
from shardwright.train.checkpoint.read import plain as read_plain
from shardwright.train.checkpoint.read.dcp import chunk_of, last_cut
from shardwright.train.checkpoint.read.reader import Reader
from shardwright.train.units import counted

PATTERN = "shard-*-model-*-of-*.safetensors"
_PLACES = "DCP_SHARDING_INFO"
"""Where a file's metadata says from which index on each of its tensors belongs (torch 2.13)."""


def find(directory: Path) -> Path | None:
    """Return the directory where a file in it is named as such a shard."""
    return directory if next(directory.glob(PATTERN), None) is not None else None


def read(directory: Path) -> PortableState:
    """Return the tensors that the shards in a directory make up. Raises Unreadable."""
    chunks: dict[str, list[tuple[ChunkStorageMetadata, LazyTensor]]] = {}
    for path in sorted(directory.glob(PATTERN)):
        tensors, metadata = read_plain.with_metadata(path)
        try:
            places = json.loads(metadata[_PLACES])
            for name, tensor in tensors.items():
                offsets = [int(offset) for offset in places[name]["saved_offsets"]]
                if len(offsets) != len(tensor.shape) or min(offsets, default=0) < 0:
                    raise ValueError(f"offsets {offsets} of a tensor of {tensor.shape}")
                chunk = ChunkStorageMetadata(offsets, tensor.shape)  # type: ignore[arg-type]
                chunks.setdefault(name, []).append((chunk, tensor))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Unreadable(
                f"{path} does not tell where its tensors belong ({type(error).__name__}: "
                f"{error}); it is named as a shard of torch's HuggingFaceStorageWriter"
            ) from None
    tensors = {name: _joined(name, parts) for name, parts in chunks.items()}
    count = len(list(directory.glob(PATTERN)))
    return read_plain.state(tensors, f"safetensors in {counted(count, 'shard')}")


def _joined(name: str, parts: list[tuple[ChunkStorageMetadata, LazyTensor]]) -> LazyTensor:
    dtypes = {tensor.dtype for _, tensor in parts}
    if len(dtypes) > 1 or len({len(chunk.sizes) for chunk, _ in parts}) > 1:
        raise Unreadable(f"the shards of {name} do not belong together")
    size = tuple(
        max(offset + length for offset, length in zip(offsets, lengths, strict=True))
        for offsets, lengths in (
            ([c.offsets[d] for c, _ in parts], [c.sizes[d] for c, _ in parts])
            for d in range(len(parts[0][0].sizes))
        )
    )
    dim = last_cut(size, [chunk for chunk, _ in parts])
    # A tensor that each rank has whole is in each of the files.
    different = {tuple(chunk.offsets): (chunk, tensor) for chunk, tensor in parts if tensor.numel}
    fragments = [
        chunk_of(name, tensor.fragments[0], size, chunk, dim)
        for chunk, tensor in different.values()
    ]
    return LazyTensor(size, dtypes.pop(), tuple(sorted(fragments, key=lambda f: f.start)))


READER = Reader(PATTERN, find, read)
