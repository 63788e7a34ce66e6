"""Torch distributed checkpoints (DDP, FSDP, one rank) as portable state."""

from __future__ import annotations

import gc
import io
import math
import os
import pickle
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
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
    Span,
    Unlocated,
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
    numbers: dict[str, dict[str, LazyTensor]] = {}
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
                numbers.setdefault(parameter, {})[kind] = tensor
        elif _AVERAGES & set(keys):
            ema[name] = tensor
        else:
            sections.setdefault(tuple(keys), {})[name] = tensor
    found = _model(sections, directory, section)
    return PortableState(
        {name: tensor for name, tensor in found.items() if tensor.dtype.is_floating_point},
        moments,
        {parameter: _Numbers(tensors) for parameter, tensors in numbers.items()},
        buffers={n: tensor for n, tensor in found.items() if not tensor.dtype.is_floating_point},
        ema=ema,
        origin="torch distributed checkpoint",
    )


class _Numbers(Mapping[str, float]):
    """Numbers that lie in files, each read when it is first asked for. May raise Unreadable."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors
        self._read: dict[str, float] = {}

    def __getitem__(self, name: str) -> float:
        if name not in self._read:
            self._read[name] = float(self._tensors[name].read())
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


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
    except Unreadable:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Unreadable(
            f"{directory / METADATA} is not laid out as torch 2.11 to 2.13 do it "
            f"({type(error).__name__}: {error})"
        ) from None


def _described(metadata: Metadata, directory: Path) -> dict[tuple[str, ...], LazyTensor]:
    places: dict[str, dict[Any, Any]] = {}
    for index, info in metadata.storage_data.items():
        if index.offset is not None:
            places.setdefault(index.fqn, {})[index.offset] = info
    files = _Files(directory)
    tensors = {}
    for key, described in metadata.state_dict_metadata.items():
        if isinstance(described, TensorStorageMetadata):
            path = _path(key, metadata.planner_data)
            chunks = _Chunks(key, described, places.pop(key, {}), files)
            tensors[path] = LazyTensor(tuple(described.size), described.properties.dtype, chunks)
    return tensors


def _path(key: str, paths: Any) -> tuple[str, ...]:
    """Return the sections that a flattened key was made of, and the name in the last of them."""
    if isinstance(paths, Mapping) and isinstance(found := paths.get(key), tuple) and found:
        return tuple(map(str, found))
    # Where it is not noted, a section is told by its name.
    first, _, rest = key.partition(".")
    return (first, rest) if rest and first in _OPTIMIZERS | _AVERAGES | _MODELS else (key,)


class _Chunks(Unlocated):
    """The chunks of one tensor, where the metadata says that they lie.

    Each is a file of `torch.save` within a file. That it holds what the metadata says, and where
    its elements begin, is found when it is first asked for: at a thousand ranks there are more than
    a million, and each rank reads few. Here a chunk is no more than a row of numbers.
    """

    def __init__(
        self,
        name: str,
        described: TensorStorageMetadata,
        places: Mapping[Any, Any],
        files: _Files,
    ) -> None:
        """``places`` says by their offsets where chunks lie. Raises Unreadable."""
        self._name, self._files = name, files
        self._size, self._dtype = tuple(described.size), described.properties.dtype
        if min(self._size, default=0) < 0:
            raise Unreadable(f"{files.metadata} says that {name} has the shape {self._size}")
        self._dim = last_cut(self._size, described.chunks)
        self._stride = math.prod(self._size[self._dim :]) if self._dim else 0
        rows = sorted(self._rows(described.chunks, places))
        columns = zip(*rows, strict=True) if rows else ((),) * 6
        starts, lengths, runs, numbers, offsets, sizes = columns
        self._starts, self._lengths, self._runs = (array("q", c) for c in (starts, lengths, runs))
        self._file_numbers = array("i", numbers)
        self._offsets, self._sizes = array("q", offsets), array("q", sizes)
        self._found = array("q", [_NOT_YET]) * len(rows)

    def _rows(
        self, chunks: Iterable[ChunkStorageMetadata], places: Mapping[Any, Any]
    ) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Yield start, length and run of each chunk that holds anything, and its place in a file.

        That is the number of the file, where the chunk begins there, and its bytes.
        """
        for chunk in chunks:
            info = places.get(chunk.offsets)
            if info is None:
                raise Unreadable(f"{self._files.metadata} does not say where {self._name} lies")
            if 0 in chunk.sizes:
                continue
            if info.transform_descriptors:
                raise Unreadable(
                    f"{self._name} is stored in a transformed way: {info.transform_descriptors}"
                )
            start, run = _belongs(self._name, self._size, chunk, self._dim)
            number = self._files[info.relative_path]
            yield start, math.prod(chunk.sizes), run, number, info.offset, info.length

    def __len__(self) -> int:
        return len(self._starts)

    def spans(self) -> Iterable[tuple[int, int, int, int]]:
        return zip(self._starts, self._lengths, self._runs, repeat(self._stride), strict=False)

    def span(self, index: int) -> Span:
        return Span(self._starts[index], self._lengths[index], self._runs[index], self._stride)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        span = self.span(index)
        path = self._files.paths[self._file_numbers[index]]
        if self._found[index] == _NOT_YET:
            self._found[index] = self._locate(index, path, span)
        return Fragment(path, self._found[index], *span)

    def _locate(self, index: int, path: Path, span: Span) -> int:
        """Return where in its file the elements of a chunk begin. Raises Unreadable."""
        offset = self._offsets[index]
        with path.open("rb") as file:
            stored = describe(_Slice(file, offset, self._sizes[index]))
        name, shape = self._name, self._shape(span)
        if not isinstance(stored, torch.Tensor):
            raise Unreadable(f"{path} holds a {type(stored).__name__} for {name}, not a tensor")
        if tuple(stored.shape) != shape:
            raise Unreadable(f"{path} holds {tuple(stored.shape)} of {name}, not {shape}")
        if stored.dtype != self._dtype:
            raise Unreadable(f"{path} holds {name} in {stored.dtype}, not {self._dtype}")
        return flat(stored, path, base_bytes=offset).offset_bytes

    def _shape(self, span: Span) -> tuple[int, ...]:
        """Return the shape of a chunk: it is cut along the first dimension and one more at most."""
        size, dim = self._size, self._dim
        if not size:
            return ()
        if not dim:
            return span.length // math.prod(size[1:]), *size[1:]
        inner = math.prod(size[dim + 1 :])
        rows = span.length // (span.run * math.prod(size[1:dim]))
        return rows, *size[1:dim], span.run // inner, *size[dim + 1 :]


_NOT_YET = -1


def last_cut(size: tuple[int, ...], chunks: Iterable[ChunkStorageMetadata]) -> int:
    """Return the last dimension along which some chunk has not all of a tensor."""
    cut = [
        dim
        for chunk in chunks
        for dim in range(len(size))
        if chunk.offsets[dim] or chunk.sizes[dim] != size[dim]
    ]
    return max(cut, default=0)


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
    start, run = _belongs(name, size, chunk, dim)
    stride = math.prod(size[dim:]) if run else 0
    return Fragment(where.path, where.offset_bytes, start, where.length, run, stride)


def _belongs(
    name: str, size: tuple[int, ...], chunk: ChunkStorageMetadata, dim: int
) -> tuple[int, int]:
    """Return where in a flattened tensor a chunk begins, and its run. Raises Unreadable."""
    if dim == 0:
        return (chunk.offsets[0] * math.prod(size[1:]) if size else 0), 0
    start = sum(o * math.prod(size[i + 1 :]) for i, o in enumerate(chunk.offsets))
    # Dimensions between the first and the last cut one have to be whole for one distance to do.
    if not _is_whole(chunk, size, range(1, dim)):
        raise Unreadable(f"{name} is cut along more than one dimension after its first")
    return start, chunk.sizes[dim] * math.prod(size[dim + 1 :])


def _is_whole(chunk: ChunkStorageMetadata, size: Sequence[int], dims: Iterable[int]) -> bool:
    return all(chunk.offsets[dim] == 0 and chunk.sizes[dim] == size[dim] for dim in dims)


class _Files(dict[str, int]):
    """From the names that a directory's metadata gives its files to their places in ``paths``.

    Each is looked for when it is first asked for. Raises Unreadable where it lies elsewhere.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.metadata = directory / METADATA
        self.paths: list[Path] = []
        self._directory = directory
        # A look at the whole directory tells this of all of its files at once.
        with os.scandir(directory) as entries:
            self._plain = {e.name for e in entries if e.is_file(follow_symlinks=False)}

    def __missing__(self, relative: str) -> int:
        self.paths.append(self._inside(relative))
        self[relative] = len(self.paths) - 1
        return self[relative]

    def _inside(self, relative: str) -> Path:
        path = self._directory / relative
        if relative in self._plain:
            return path
        # Links that lead out of the directory are followed nowhere.
        root = self._directory.resolve()
        if not path.is_file() or not path.resolve().is_relative_to(root):
            raise Unreadable(f"{self.metadata} names the file {relative}, which is not in it")
        return path


def _metadata(path: Path) -> Metadata:
    try:
        with _uncollected(), path.open("rb") as file:
            found = _Unpickler(file).load()
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


@contextmanager
def _uncollected() -> Iterator[None]:
    """Make objects without the garbage collector, which looks at all of them again and again.

    What describes a million chunks has no circles, and takes it three times as long as to unpickle.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
