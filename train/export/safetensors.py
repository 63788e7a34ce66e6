"""Whole tensors into safetensors files, a slice at a time: memory does not grow with the model.

A file of that format is the length of a header as 8 bytes, the header as JSON, and the data of its
tensors end to end. So everything but the data is known before the first byte: files get their size
and header at once, and slices go to their places in any order. safetensors' own `save_file` wants
all tensors of a file in memory.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, local
from typing import TypeVar

import torch

from shardwright.train.checkpoint.format.lazy import LazyTensor
from shardwright.train.checkpoint.format.outputs import Output, Place, share

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"

BLOCK_BYTES = max(4096, mmap.PAGESIZE)
"""The unit of what is written past the page cache.

Disks are content with 4096. Whole pages, so that the cache holds none of which a part goes past it.
"""

_T = TypeVar("_T")

# The format's words for dtypes.
_WORDS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


# --- what goes where ----------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file of tensors, all but its data."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    """Where in the file each tensor begins, in bytes."""
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The files of some tensors, and which of them holds which."""

    outputs: Mapping[str, Output]
    files: tuple[File, ...]
    index: bytes | None
    """What INDEX holds, where there are several files."""
    places: Mapping[str, tuple[Place, ...]]
    """Of tensors that are written under other names or in parts: where each element goes."""

    def of(self, name: str) -> tuple[Place, ...]:
        """Return where the elements of a tensor go, in their order."""
        if name in self.places:
            return self.places[name]
        return (Place(0, self.outputs[name].numel, name, 0),)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is written."""
        return self.outputs[self.places[name][0].output if name in self.places else name].dtype

    @property
    def tensor_bytes(self) -> int:
        return sum(output.bytes for output in self.outputs.values())

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files) + len(self.index or b"")


def plan(
    outputs: Iterable[Output],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    places: Mapping[str, tuple[Place, ...]] | None = None,
) -> Plan:
    """Divide tensors, in their order, into files of at most this many bytes of data. Pure.

    A tensor that is larger gets a file of its own. ``places`` says of tensors that are no outputs
    themselves of which they become parts.
    """
    shards: list[list[Output]] = [[]]
    room = max_shard_bytes
    by_name = {}
    for output in outputs:
        if shards[-1] and output.bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(output)
        room -= output.bytes
        by_name[output.name] = output
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        return Plan(by_name, (_file("model.safetensors", shards[0]),), None, places or {})
    files = tuple(_file(name, shard) for name, shard in zip(names, shards, strict=True))
    index = {
        "metadata": {"total_size": sum(output.bytes for output in by_name.values())},
        "weight_map": {name: file.name for file in files for name in file.offsets},
    }
    return Plan(by_name, files, (json.dumps(index, indent=2) + "\n").encode(), places or {})


def _file(name: str, outputs: list[Output]) -> File:
    # Wide elements first, so that each tensor begins at a multiple of its own.
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for output in ordered:
        starts[output.name], end = end, end + output.bytes
        header[output.name] = {
            "dtype": _WORDS[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [starts[output.name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text) + 8
    offsets = {name: begin + start for name, start in starts.items()}
    return File(name, len(text).to_bytes(8, "little") + text, offsets, begin + end)


# --- writing ------------------------------------------------------------------------------------


class Writer:
    """Writes slices of a plan's tensors into a directory, from any thread, in any order.

    Several processes may, each other slices: the first makes the files, in their full size from the
    beginning. With ``past_cache`` what lies in memory as in its file (`phase`) goes to the disk
    without a copy in the page cache, where the file system can. Raises OSError where the files do
    not fit.
    """

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        *,
        allow_nan: bool = False,
        makes_files: bool = True,
        past_cache: bool = False,
    ) -> None:
        self.plan = plan
        self._directory, self._allow_nan = directory, allow_nan
        self._past_cache = past_cache and hasattr(os, "O_DIRECT")
        self._files = {name: file for file in plan.files for name in file.offsets}
        self._touched: dict[str, File] = {}
        """The files that `flush` waits for, by name."""
        if not makes_files:
            return
        for file in plan.files:
            path = directory / file.name
            with path.open("xb") as stream:
                _reserve(stream.fileno(), file.bytes, path)
                stream.write(file.header)
            self._touched[file.name] = file
        if plan.index is not None:
            (directory / INDEX).write_bytes(plan.index)

    def write(
        self,
        name: str,
        values: torch.Tensor,
        start: int = 0,
        buffer: torch.Tensor | None = None,
    ) -> None:
        """Write some consecutive elements from the ``start``-th on, in the plan's dtype.

        They are cast into ``buffer``, bytes that are enough for it, where one is given.
        Raises FloatingPointError where one is not finite, unless that is allowed, OverflowError
        where one becomes infinite in the plan's dtype, and OSError.
        """
        dtype = self.plan.dtype(name)
        values = values.detach().flatten()
        if not values.numel():
            return
        if buffer is None or values.dtype == dtype:
            cast = values.to(dtype).contiguous()
        else:
            cast = buffer[: values.numel() * dtype.itemsize].view(dtype).copy_(values)
        _check_finite(name, values, cast, allow_nan=self._allow_nan)
        stop = start + values.numel()
        for place in self.plan.of(name):
            first, last = max(start, place.start), min(stop, place.start + place.length)
            if first < last:
                part = cast[first - start : last - start]
                self._write(place.output, part, place.output_start + first - place.start)

    def phase(self, name: str, start: int) -> int:
        """Return by how many bytes an element of a tensor lies behind the start of a disk block."""
        for place in self.plan.of(name):
            if place.start <= start < place.start + place.length:
                at = place.output_start + start - place.start
                offset = self._files[place.output].offsets[place.output]
                return (offset + at * self.plan.dtype(name).itemsize) % BLOCK_BYTES
        return 0

    def _write(self, output: str, values: torch.Tensor, start: int) -> None:
        file = self._files[output]
        offset = file.offsets[output] + start * values.element_size()
        self._touched[file.name] = file
        path, data = self._directory / file.name, values.view(torch.uint8).numpy().data
        begin, end = 0, 0
        if self._past_cache:
            begin, end = in_blocks(offset, values.data_ptr(), len(data))
        if begin < end and not _write_past_cache(data[begin:end], path, offset + begin):
            self._past_cache, begin, end = False, 0, 0
        for first, last in ((0, begin), (end, len(data))):
            if first < last:
                _write_at(data[first:last], path, offset + first)

    def flush(self) -> None:
        """Wait until what this process has written is on the disk: no other one can do it.

        Raises OSError, as where a file has not its size.
        """
        for file in self._touched.values():
            path = self._directory / file.name
            descriptor = os.open(path, os.O_WRONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            _check_size(path, file)

    def check_sizes(self) -> None:
        """Raise OSError where a file has not its size, whoever has written to it."""
        for file in self.plan.files:
            _check_size(self._directory / file.name, file)


def _check_size(path: Path, file: File) -> None:
    if (size := path.stat().st_size) != file.bytes:
        raise OSError(errno.EIO, f"it has {size} bytes instead of {file.bytes}", str(path))


def _check_finite(name: str, values: torch.Tensor, cast: torch.Tensor, *, allow_nan: bool) -> None:
    # The extremes tell it in one pass and without a copy: NaN is both of them wherever it is.
    if not cast.is_floating_point() or (cast.dtype.itemsize > 1 and _is_finite(cast)):
        return
    word = str(cast.dtype).removeprefix("torch.")
    if cast.dtype.itemsize == 1:  # for which torch has no such functions
        values, cast = values.float(), cast.float()
    if (cast.isinf() & values.isfinite()).any():
        largest = values[values.isfinite()].abs().max().item()
        raise OverflowError(f"{name} holds {largest:g}, which becomes infinity in {word}")
    if not (allow_nan or cast.isfinite().all()):
        raise FloatingPointError(f"{name} holds NaN or infinity")


def _is_finite(values: torch.Tensor) -> bool:
    least, most = torch.aminmax(values)
    return math.isfinite(least.item()) and math.isfinite(most.item())


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Give a file its size, and its blocks where the file system can.

    Not `os.posix_fallocate`, which writes to every block where the file system cannot.
    """
    os.truncate(descriptor, size)
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(descriptor, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code), str(path))


def in_blocks(offset: int, address: int, length: int) -> tuple[int, int]:
    """Return which bytes of some fill blocks of their file and of memory alike. Pure.

    None, where those of the file and of memory begin at different ones.
    """
    begin = -offset % BLOCK_BYTES
    end = (offset + length) // BLOCK_BYTES * BLOCK_BYTES - offset
    return (begin, end) if begin < end and not (address + begin) % BLOCK_BYTES else (0, 0)


def _write_past_cache(data: memoryview, path: Path, offset: int) -> bool:
    """Write whole blocks straight to the disk; return False where the file system cannot."""
    try:
        _write_at(data, path, offset, os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _write_at(data: memoryview, path: Path, offset: int, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | flags)
    try:
        done = 0
        while done < len(data):
            # Linux moves at most 2 GiB a call.
            done += os.pwrite(descriptor, data[done : done + 2**30], offset + done)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


# --- from files into files ----------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How much is in memory at a time: a slice on each thread."""

    threads: int
    slice_bytes: int

    @property
    def bytes(self) -> int:
        return self.threads * self.slice_bytes * _COPIES + RESERVED_BYTES


RESERVED_BYTES = 40 * 2**20
"""What everything but the slices may take: where tensors lie, the model's description, its load."""
_COPIES = 3
"""Of a slice: as read, as cast, and what comparing takes where it is not finite."""
_LEAST_SLICE_BYTES, _MOST_SLICE_BYTES = 2**18, 2**23
"""What a disk likes to be asked for at least, and what is no faster when it grows."""
LEAST_MEMORY_BYTES = RESERVED_BYTES + _COPIES * _LEAST_SLICE_BYTES


def budget(max_memory_bytes: int, cores: int) -> Budget:
    """Return how to use so much memory, at least LEAST_MEMORY_BYTES of it. Pure."""
    room = (max_memory_bytes - RESERVED_BYTES) // _COPIES
    assert room >= _LEAST_SLICE_BYTES
    threads = min(cores, room // _LEAST_SLICE_BYTES)
    return Budget(threads, min(room // threads, _MOST_SLICE_BYTES) // 8 * 8)


def stream(
    tensors: Mapping[str, LazyTensor],
    writer: Writer,
    budget: Budget,
    advance: Callable[[int], object] = lambda written_bytes: None,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Write whole tensors from the files in which they lie, slice by slice on several threads.

    Or this process's ``part`` of all their elements: its number among how many. ``advance`` is
    called with the number of bytes just written, from one thread at a time. Raises what
    `Writer.write` and `LazyTensor.read` do.
    """
    found = list(tensors.items())

    def slices() -> Iterator[tuple[str, int, int]]:
        for number, begin, end in share((tensor.numel for _, tensor in found), *part):
            name, tensor = found[number]
            # 16 bits may be cast to 32.
            step = max(1, budget.slice_bytes // max(4, tensor.dtype.itemsize))
            itemsize, start = writer.plan.dtype(name).itemsize, begin
            while start < end:
                # All but the first begin with a block of the file, if they are as long as one.
                beyond = writer.phase(name, start) // itemsize
                stop = min(start + step - (beyond if beyond < step else 0), end)
                yield name, start, stop
                start = stop

    counting, of_thread = Lock(), local()

    def write(part: tuple[str, int, int]) -> None:
        name, start, stop = part
        if not hasattr(of_thread, "buffers"):
            # The allocator would keep several of each thread's.
            of_thread.buffers = [_aligned(budget.slice_bytes + BLOCK_BYTES) for _ in range(2)]
        source, target = of_thread.buffers
        phase = writer.phase(name, start)
        # What is not cast is written from where it has been read to.
        is_cast = tensors[name].dtype != writer.plan.dtype(name)
        values = tensors[name].read(start, stop, source if is_cast else source[phase:])
        writer.write(name, values, start, target[phase:])
        with counting:
            advance((stop - start) * writer.plan.dtype(name).itemsize)

    on_threads(slices(), write, budget.threads)


def _aligned(size: int) -> torch.Tensor:
    """Return so many bytes, the first of which begins a block of memory."""
    bytes_ = torch.empty(size + BLOCK_BYTES, dtype=torch.uint8)
    begin = -bytes_.data_ptr() % BLOCK_BYTES
    return bytes_[begin : begin + size]


def on_threads(work: Iterator[_T], do: Callable[[_T], None], threads: int) -> None:
    """Do all work on so many threads; the first error of all ends it and is raised."""
    taking, stopped = Lock(), Event()

    def loop() -> None:
        while not stopped.is_set():
            with taking:
                item = next(work, None)
            if item is None:
                return
            do(item)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for ended in as_completed([pool.submit(loop) for _ in range(threads)]):
                ended.result()
        finally:  # an error, or Ctrl-C, which reaches the main thread only
            stopped.set()
