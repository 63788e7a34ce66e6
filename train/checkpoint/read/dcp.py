"""Torch distributed checkpoints (DDP, FSDP, one rank) as portable state."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from shardwright.train.checkpoint.format.lazy import (
    Fragment,
    LazyTensor,
    PortableState,
    Unreadable,
    describe,
    flat,
)
from shardwright.train.checkpoint.read.reader import Reader
from shardwright.train.run_directory.names import ENGINE_FOLDER

METADATA = ".metadata"

# All that a .metadata of torch 2.11 to 2.13 is made of; it is a pickle, read by torch as code.
_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8"}
    | {"bool", "int8", "int16", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"}
    | {"strided", "contiguous_format", "preserve_format"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}


FSDP, FSDP_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
"""What accelerate calls the folders of a sharded checkpoint."""

# Names of the sections that programs give to `save`, by what they hold.
_OPTIMIZERS = {"optimizer", "optimizers", "optim", "opt", "optimizer_state_dict"}
_AVERAGES = {"ema", "ema_model", "model_ema", "ema_state_dict"}
_MODELS = {"model", "module", "state_dict", "model_state_dict"}


def find(directory: Path) -> Path | None:
    """Return the directory with a .metadata: this one, or accelerate's folder in it."""
    folders = (directory, directory / FSDP)
    return next((folder for folder in folders if (folder / METADATA).is_file()), None)


def _optimizer_beside(directory: Path) -> Path | None:
    folder = directory.parent / FSDP_OPTIMIZER
    is_one = directory.name == FSDP and (folder / METADATA).is_file()
    return folder if is_one else None


def read(directory: Path, section: str | None = None) -> PortableState:
    """Return what is in a directory with a .metadata, whatever its sections are called.

    The optimizer's state may be in another one beside it. ``section`` names that of the weights,
    where there are several. Raises Unreadable.
    """
    tensors = _tensors(directory)
    if (optimizer := _optimizer_beside(directory)) is not None:
        tensors |= {p: t for p, t in _tensors(optimizer).items() if _OPTIMIZERS & set(p[:-1])}
    moments: dict[str, dict[str, LazyTensor]] = {}
    scalars: dict[str, dict[str, float]] = {}
    ema: dict[str, LazyTensor] = {}
    sections: dict[tuple[str, ...], dict[str, LazyTensor]] = {}
    for (*keys, name), tensor in tensors.items():
        if _OPTIMIZERS & set(keys):
            first = next(i for i, part in enumerate(keys) if part in _OPTIMIZERS)
            entry = ".".join([*keys[first + 1 :], name])
            parameter, _, kind = entry.removeprefix("state.").rpartition(".")
            if not entry.startswith("state.") or not parameter:
                continue
            if tensor.shape:
                moments.setdefault(parameter, {})[kind] = tensor
            else:
                scalars.setdefault(parameter, {})[kind] = float(tensor.read())
        elif _AVERAGES & set(keys):
            ema[name] = tensor
        else:
            sections.setdefault(tuple(keys), {})[name] = tensor
    found = _model(sections, directory, section)
    return PortableState(
        {name: tensor for name, tensor in found.items() if tensor.dtype.is_floating_point},
        moments,
        scalars,
        buffers={n: tensor for n, tensor in found.items() if not tensor.dtype.is_floating_point},
        ema=ema,
        origin="torch distributed checkpoint",
    )


def _model(
    sections: Mapping[tuple[str, ...], dict[str, LazyTensor]], directory: Path, asked: str | None
) -> dict[str, LazyTensor]:
    """Return the one section that holds the weights. Raises Unreadable."""
    # A schedule or the place in the data has numbers only.
    large = {s: t for s, t in sections.items() if any(tensor.shape for tensor in t.values())}
    there = ", ".join(sorted(".".join(section) or "(no section)" for section in large)) or "none"
    if asked is not None:
        chosen = next((t for s, t in large.items() if ".".join(s) == asked), None)
        if chosen is None:
            raise Unreadable(f"{directory / METADATA} has no section {asked}; it has {there}")
        return chosen
    named = {s: t for s, t in large.items() if s and s[-1] in _MODELS}
    for candidates in (named, large):
        if len(candidates) == 1:
            return next(iter(candidates.values()))
    raise Unreadable(
        f"{directory / METADATA} was searched for one section of weights, such as model or "
        f"state_dict; sections with tensors: {there}. Name the one to read: --section NAME"
    )


def _tensors(directory: Path) -> dict[tuple[str, ...], LazyTensor]:
    """Return each tensor by the sections that lead to it and its name."""
    metadata = _metadata(directory / METADATA)
    try:
        return _described(metadata, directory)
    except (KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
        raise Unreadable(
            f"{directory / METADATA} is not laid out as torch 2.11 to 2.13 do it "
            f"({type(error).__name__}: {error})"
        ) from None


def _described(metadata: Metadata, directory: Path) -> dict[tuple[str, ...], LazyTensor]:
    assert metadata.storage_data is not None
    places: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, info in metadata.storage_data.items():
        if index.offset is not None:
            places.setdefault(index.fqn, {})[tuple(index.offset)] = info
    tensors = {}
    for key, described in metadata.state_dict_metadata.items():
        if isinstance(described, TensorStorageMetadata):
            path = _path(key, metadata.planner_data)
            tensors[path] = _tensor(key, described, places.get(key, {}), directory)
    return tensors


def _path(key: str, paths: Any) -> tuple[str, ...]:
    """Return the sections that a flattened key was made of, and the name in the last of them."""
    if isinstance(paths, Mapping) and isinstance(found := paths.get(key), tuple) and found:
        return tuple(map(str, found))
    # Where it is not noted, a section is told by its name.
    first, _, rest = key.partition(".")
    return (first, rest) if rest and first in _OPTIMIZERS | _AVERAGES | _MODELS else (key,)


def _tensor(
    name: str,
    described: TensorStorageMetadata,
    places: Mapping[tuple[int, ...], Any],
    directory: Path,
) -> LazyTensor:
    size = tuple(described.size)
    dim = last_cut(size, described.chunks)
    fragments = []
    for chunk in described.chunks:
        info = places.get(tuple(chunk.offsets))
        if info is None:
            raise Unreadable(f"{directory / METADATA} does not say where {name} lies")
        if 0 not in chunk.sizes:
            fragments.append(_fragment(name, chunk, described, info, directory, dim))
    ordered = tuple(sorted(fragments, key=lambda fragment: fragment.start))
    return LazyTensor(size, described.properties.dtype, ordered)


def last_cut(size: tuple[int, ...], chunks: Iterable[ChunkStorageMetadata]) -> int:
    """Return the last dimension along which some chunk has not all of a tensor."""
    cut = [
        dim
        for chunk in chunks
        for dim in range(len(size))
        if chunk.offsets[dim] or chunk.sizes[dim] != size[dim]
    ]
    return max(cut, default=0)


def _fragment(
    name: str,
    chunk: ChunkStorageMetadata,
    described: TensorStorageMetadata,
    info: Any,
    directory: Path,
    dim: int,
) -> Fragment:
    """Return where a chunk lies and where it belongs; ``dim`` is the last one that is cut."""
    size, dtype = tuple(described.size), described.properties.dtype
    if getattr(info, "transform_descriptors", None):
        raise Unreadable(f"{name} is stored in a transformed way: {info.transform_descriptors}")
    path = _inside(directory, info.relative_path)
    with path.open("rb") as file:
        stored = describe(_Slice(file, info.offset, info.length))
    if not isinstance(stored, torch.Tensor):
        raise Unreadable(f"{path} holds a {type(stored).__name__} for {name}, not a tensor")
    if tuple(stored.shape) != tuple(chunk.sizes):
        raise Unreadable(f"{path} holds {tuple(stored.shape)} of {name}, not {tuple(chunk.sizes)}")
    if stored.dtype != dtype:
        raise Unreadable(f"{path} holds {name} in {stored.dtype}, not {dtype}")
    found = flat(stored, path, base_bytes=info.offset)
    return chunk_of(name, found, size, chunk, dim)


def chunk_of(
    name: str,
    where: Fragment,
    size: tuple[int, ...],
    chunk: ChunkStorageMetadata,
    dim: int,
) -> Fragment:
    """Return where a chunk that lies at ``where`` belongs in a tensor of ``size``.

    ``dim`` is the last dimension along which some chunk is cut. Raises Unreadable.
    """
    start = sum(o * math.prod(size[i + 1 :]) for i, o in enumerate(chunk.offsets))
    if dim == 0:
        return Fragment(where.path, where.offset_bytes, start, where.length)
    # Dimensions between the first and the last cut one have to be whole for one distance to do.
    if not _is_whole(chunk, size, range(1, dim)):
        raise Unreadable(f"{name} is cut along more than one dimension after its first")
    run = chunk.sizes[dim] * math.prod(size[dim + 1 :])
    stride = math.prod(size[dim:])
    return Fragment(where.path, where.offset_bytes, start, where.length, run, stride)


def _is_whole(chunk: ChunkStorageMetadata, size: Sequence[int], dims: Iterable[int]) -> bool:
    return all(chunk.offsets[dim] == 0 and chunk.sizes[dim] == size[dim] for dim in dims)


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
        raise Unreadable(f"{path} is not the metadata of a distributed checkpoint")
    kinds = (TensorStorageMetadata, BytesStorageMetadata)
    if not all(isinstance(entry, kinds) for entry in found.state_dict_metadata.values()):
        raise Unreadable(f"{path} holds entries of an unknown kind")
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise Unreadable(f"a checkpoint's .metadata names {module}.{name}, which is refused")
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


READER = Reader(
    f"a distributed checkpoint's {METADATA} (there, in {ENGINE_FOLDER}/ or in {FSDP}/)",
    find,
    read,
    read_section=read,
    is_an_engines=True,
)
