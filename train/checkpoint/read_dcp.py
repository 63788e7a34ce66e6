"""Torch distributed checkpoints (DDP, FSDP, one rank) as portable state."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from train.checkpoint.lazy import Fragment, LazyTensor, PortableState, Unreadable, describe, flat

METADATA = ".metadata"

# All that a .metadata of torch 2.11 to 2.13 is made of; it is a pickle, read by torch as code.
_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8"}
    | {"bool", "int8", "int16", "strided", "contiguous_format", "preserve_format"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}


def read(directory: Path) -> PortableState:
    """Return what is in a directory with a .metadata; entries are named as in `get_state_dict`.

    Raises Unreadable.
    """
    metadata = _metadata(directory / METADATA)
    try:
        return _state(metadata, directory)
    except (KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
        raise Unreadable(
            f"{directory / METADATA} is not laid out as torch 2.11 to 2.13 do it "
            f"({type(error).__name__}: {error})"
        ) from None


def _state(metadata: Metadata, directory: Path) -> PortableState:
    tensors: dict[str, LazyTensor] = {}
    for name, described in metadata.state_dict_metadata.items():
        if isinstance(described, TensorStorageMetadata):
            tensors[name] = _tensor(name, described, metadata, directory)
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    moments: dict[str, dict[str, LazyTensor]] = {}
    scalars: dict[str, dict[str, float]] = {}
    for name, tensor in tensors.items():
        if not name.startswith("optimizer.state."):
            continue
        parameter, _, kind = name.removeprefix("optimizer.state.").rpartition(".")
        if tensor.shape:
            moments.setdefault(parameter, {})[kind] = tensor
        else:
            scalars.setdefault(parameter, {})[kind] = float(tensor.read())
    return PortableState(weights, moments, scalars)


def _tensor(
    name: str, described: TensorStorageMetadata, metadata: Metadata, directory: Path
) -> LazyTensor:
    assert metadata.storage_data is not None
    fragments = []
    places = {
        tuple(index.offset): info
        for index, info in metadata.storage_data.items()
        if index.fqn == name and index.offset is not None
    }
    for chunk in described.chunks:
        info = places.get(tuple(chunk.offsets))
        if info is None:
            raise Unreadable(f"{directory / METADATA} does not say where {name} lies")
        if 0 in chunk.sizes:
            continue
        fragments.append(_fragment(name, chunk, described, info, directory))
    ordered = tuple(sorted(fragments, key=lambda fragment: fragment.start))
    return LazyTensor(tuple(described.size), described.properties.dtype, ordered)


def _fragment(
    name: str,
    chunk: ChunkStorageMetadata,
    described: TensorStorageMetadata,
    info: Any,
    directory: Path,
) -> Fragment:
    size, dtype = tuple(described.size), described.properties.dtype
    if any(chunk.offsets[1:]) or tuple(chunk.sizes[1:]) != size[1:]:
        raise Unreadable(f"{name} is cut along another dimension than its first")
    path = _inside(directory, info.relative_path)
    with path.open("rb") as file:
        stored = describe(_Slice(file, info.offset, info.length))
    if not isinstance(stored, torch.Tensor):
        raise Unreadable(f"{path} holds a {type(stored).__name__} for {name}, not a tensor")
    if tuple(stored.shape) != tuple(chunk.sizes):
        raise Unreadable(f"{path} holds {tuple(stored.shape)} of {name}, not {tuple(chunk.sizes)}")
    if stored.dtype != dtype:
        raise Unreadable(f"{path} holds {name} in {stored.dtype}, not {dtype}")
    start = (chunk.offsets[0] if size else 0) * math.prod(size[1:])
    found = flat(stored, path, base_bytes=info.offset)
    return Fragment(path, found.offset_bytes, start, found.length)


def _inside(directory: Path, relative: str) -> Path:
    path = directory / relative
    # Links that lead out of the directory are followed nowhere.
    if not path.is_file() or not path.resolve().is_relative_to(directory.resolve()):
        raise Unreadable(f"{directory / METADATA} names the file {relative}, which is not in it")
    return path


def _metadata(path: Path) -> Metadata:
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(found, Metadata):
        raise Unreadable(f"{path} is no metadata of a distributed checkpoint")
    kinds = (TensorStorageMetadata, BytesStorageMetadata)
    if not all(isinstance(entry, kinds) for entry in found.state_dict_metadata.values()):
        raise Unreadable(f"{path} holds entries of an unknown kind")
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise Unreadable(f"a checkpoint's .metadata asks for {module}.{name}; it is refused")
        return super().find_class(module, name)


class _Slice(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.name = f"{file.name} at {offset}"
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + position)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        wanted = max(0, min(len(buffer), self._length - self._position))
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
