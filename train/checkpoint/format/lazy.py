"""Tensors that lie in files: found without reading them, read in slices, never run as code."""

from __future__ import annotations

import io
import math
import os
from abc import abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class Unreadable(ValueError):
    """A file that is not what its name says, or holds what must not be run."""


class Span(NamedTuple):
    """Which elements of a flattened tensor a fragment holds, by the same names."""

    start: int
    length: int
    run: int
    stride: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some elements of a flattened tensor that lie without a gap in a file.

    In the tensor they are consecutive too, or, of one that is cut along columns, runs of ``run``
    elements, each ``stride`` after the one before.
    """

    path: Path
    offset_bytes: int
    start: int
    """The first one's place in the whole flattened tensor."""
    length: int
    run: int = 0
    """0 where all are consecutive."""
    stride: int = 0


class Unlocated(Sequence[Fragment]):
    """Fragments of which it is known what they hold, and not yet where in their files it lies.

    To take one out finds that, and may raise Unreadable. There may be millions in a checkpoint.
    """

    @abstractmethod
    def spans(self) -> Iterable[tuple[int, int, int, int]]:
        """Return what each holds, in order; touches no file."""

    @abstractmethod
    def span(self, index: int) -> Span:
        """Return what one holds; touches no file."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in one or more files. The fragments, in order, cover it without a gap."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fragments: tuple[Fragment, ...] | Unlocated

    def __post_init__(self) -> None:
        spans = list(_spans(self.fragments))
        if any(map(itemgetter(2), spans)):  # some are runs
            _check_columns(spans, self.numel)
            return
        end = 0
        for start, length, _, _ in spans:
            if start != end:
                raise Unreadable(
                    f"elements {end} to {start} of a tensor of {self.numel} are in no file"
                )
            end += length
        if end != self.numel:
            raise Unreadable(f"{end} of a tensor's {self.numel} elements are in the files")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(
        self, start: int = 0, stop: int | None = None, buffer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the flattened elements [start, stop) on the CPU, in the dtype of the file.

        Memory is that of the result, which lies in ``buffer``, bytes that are enough for it, where
        one is given. Raises Unreadable where a file ends too early.
        """
        stop = self.numel if stop is None else stop
        if not 0 <= start <= stop <= self.numel:
            raise Unreadable(f"elements {start} to {stop} of a tensor of {self.numel}")
        if buffer is None:
            result = torch.empty(stop - start, dtype=self.dtype)
        else:
            result = buffer[: (stop - start) * self.dtype.itemsize].view(self.dtype)
        for index in self._between(start, stop):
            fragment = self.fragments[index]
            if fragment.run:
                _read_runs(result, start, fragment)
                continue
            first = max(start, fragment.start)
            last = min(stop, fragment.start + fragment.length)
            target = result[first - start : last - start]
            _read_elements(target, fragment, first - fragment.start)
        return result

    def whole(self) -> torch.Tensor:
        """Return all of it, in its shape."""
        return self.read().view(self.shape)

    def cut(self, start: int, length: int, at: int) -> Iterator[Fragment]:
        """Yield where ``length`` elements from the ``start``-th on lie, placed from ``at`` on."""
        if len(self.fragments) and _span(self.fragments, 0).run:
            raise Unreadable("a tensor that is cut along columns can only be taken as a whole")
        for index in self._between(start, start + length):
            fragment = self.fragments[index]
            first = max(start, fragment.start)
            last = min(start + length, fragment.start + fragment.length)
            begin = first - fragment.start
            yield part(fragment, self.dtype.itemsize, begin, last - first, at + first - start)

    def _between(self, start: int, stop: int) -> Iterator[int]:
        """Yield which fragments hold some of the flattened elements [start, stop)."""
        count = len(self.fragments)
        # Those of a tensor that is cut along columns lie between one another.
        is_in_columns = count > 0 and _span(self.fragments, 0).run > 0
        first = 0
        if not is_in_columns:
            first = bisect_right(range(count), start, key=lambda i: _span(self.fragments, i).start)
        for index in range(max(0, first - 1), count):
            span = _span(self.fragments, index)
            if span.start >= stop and not is_in_columns:
                return
            if _holds_some(span, start, stop):
                yield index


def locate(tensors: Iterable[LazyTensor]) -> None:
    """Find where every fragment lies. Raises Unreadable where one is not what it is said to be."""
    for tensor in tensors:
        for _ in tensor.fragments:
            pass


def _holds_some(span: Span, start: int, stop: int) -> bool:
    """Return whether some of the elements [start, stop) are among those of a fragment. Pure."""
    if start == stop or not span.length:
        return False
    run, stride = (span.run, span.stride) if span.run else (span.length, span.length)
    row = max(0, (start - span.start - run) // stride + 1)  # the first that does not end before
    return row < span.length // run and span.start + row * stride < stop


def _spans(fragments: Sequence[Fragment]) -> Iterable[tuple[int, int, int, int]]:
    if isinstance(fragments, Unlocated):
        return fragments.spans()
    return ((f.start, f.length, f.run, f.stride) for f in fragments)


def _span(fragments: Sequence[Fragment], index: int) -> Span:
    if isinstance(fragments, Unlocated):
        return fragments.span(index)
    fragment = fragments[index]
    return Span(fragment.start, fragment.length, fragment.run, fragment.stride)


def has_only_finite(tensor: LazyTensor) -> bool:
    """Return whether no element is NaN or infinite, reading a few MiB at a time."""
    if not tensor.dtype.is_floating_point:
        return True
    block = _SCATTERED_BYTES // tensor.dtype.itemsize
    for start in range(0, tensor.numel, block):
        values = tensor.read(start, min(start + block, tensor.numel))
        # NaN is both extremes wherever it is.
        if not all(extreme.isfinite() for extreme in values.float().aminmax()):
            return False
    return True


def _check_columns(spans: Sequence[tuple[int, int, int, int]], numel: int) -> None:
    """Raise Unreadable where rectangles of a tensor seen as rows do not cover it just once."""
    stride = spans[0][3]
    boxes = []
    for start, length, run, own_stride in spans:
        top, left = divmod(start, max(stride, 1))
        fits = 0 < run <= stride - left and own_stride == stride and length % run == 0
        if not fits or start < 0 or length < 0 or numel % stride:
            raise Unreadable(f"a tensor of {numel} elements is cut in an unknown way")
        boxes.append((top, left, top + length // run, left + run))
    if (found := sum(length for _, length, _, _ in spans)) != numel:
        raise Unreadable(f"{found} of a tensor's {numel} elements are in the files")
    inside = all(bottom <= numel // stride for _, _, bottom, _ in boxes)
    if not (inside and _are_apart(boxes)):
        raise Unreadable(f"some of a tensor's {numel} elements are in no file, others in two")


def _are_apart(boxes: Iterable[tuple[int, int, int, int]]) -> bool:
    """Return whether no two rectangles (top, left, bottom, right) overlap. Pure.

    A line goes down the rows, and what it crosses is kept in order of columns: of each rectangle
    that begins it is enough to look at its two neighbours.
    """
    events = []
    for top, left, bottom, right in boxes:
        if top < bottom:
            # What ends in a row has left it before the next begins there.
            events += [(top, True, left, right), (bottom, False, left, right)]
    crossed: list[tuple[int, int]] = []
    for _, begins, left, right in sorted(events):
        if not begins:
            del crossed[bisect_left(crossed, (left, right))]
            continue
        place = bisect_left(crossed, (left, right))
        around = [*crossed[max(0, place - 1) : place], (left, right), *crossed[place : place + 1]]
        if any(one[1] > other[0] for one, other in pairwise(around)):
            return False
        insort(crossed, (left, right))
    return True


def _read_runs(result: torch.Tensor, start: int, fragment: Fragment) -> None:
    """Fill in those elements of [start, start + len(result)) that are in one fragment of runs."""
    stop, run, stride = start + result.numel(), fragment.run, fragment.stride
    # Rows from which something is wanted; only the first and the last may be wanted in part.
    row = max(0, (start - fragment.start) // stride)
    end = min(fragment.length // run, -(-(stop - fragment.start) // stride))
    while row < end:
        place = fragment.start + row * stride
        whole = min(end, (stop - fragment.start - run) // stride + 1) - row
        if place >= start and whole > 0:
            rows = min(whole, max(1, _SCATTERED_BYTES // (run * result.element_size())))
            block = torch.empty(rows * run, dtype=result.dtype)
            _read_elements(block, fragment, row * run)
            target = result.as_strided((rows, run), (stride, 1), place - start)
            target.copy_(block.view(rows, run))
        else:
            rows = 1
            first, last = max(start, place), min(stop, place + run)
            if first < last:
                target = result[first - start : last - start]
                _read_elements(target, fragment, row * run + first - place)
        row += rows


_SCATTERED_BYTES = 2**22
"""How much is read at once to be laid out in runs."""


def _read_elements(target: torch.Tensor, fragment: Fragment, begin: int) -> None:
    """Fill a tensor with the elements of a fragment from its ``begin``-th on."""
    buffer = target.view(torch.uint8).numpy().data if target.numel() else memoryview(b"")
    _read_into(buffer, fragment.path, fragment.offset_bytes + begin * target.element_size())


def _read_into(buffer: memoryview, path: Path, offset: int) -> None:
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(buffer):
            # Linux moves at most 2 GiB a call.
            read = os.preadv(file.fileno(), [buffer[done : done + 2**30]], offset + done)
            if read == 0:
                raise Unreadable(f"{path} ends {len(buffer) - done} bytes too early")
            done += read


def flat(tensor: torch.Tensor, path: Path, *, base_bytes: int = 0) -> Fragment:
    """Return where the elements of a tensor that `describe` found lie, as one fragment."""
    if not tensor.is_contiguous():
        # The same elements in another order, or a part of a larger tensor.
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        is_permuted = tensor.permute(order).is_contiguous()
        kind = "that was saved transposed" if is_permuted else "with gaps in it"
        raise Unreadable(
            f"{path} holds a tensor of shape {tuple(tensor.shape)} {kind}; save it again after "
            ".contiguous()"
        )
    # Set by torch.load under FakeTensorMode (torch/serialization.py, load_tensor), not for files of
    # its old format.
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        if type(tensor) is not FakeTensor:
            raise Unreadable(
                f"{path} holds a quantised tensor ({type(tensor).__name__}), which only the "
                "program that wrote it can load, as a whole"
            )
        raise Unreadable(f"{path} is in the format of torch before 1.6; save it again")
    begin = offset + tensor.storage_offset() * tensor.element_size()
    return Fragment(path, base_bytes + begin, 0, tensor.numel())


def lazy(tensor: torch.Tensor, path: Path, *, base_bytes: int = 0) -> LazyTensor:
    """Return a tensor that `describe` found as one that can be read."""
    where = (flat(tensor, path, base_bytes=base_bytes),)
    return LazyTensor(tuple(tensor.shape), tensor.dtype, where)


def part(fragment: Fragment, itemsize: int, begin: int, length: int, start: int) -> Fragment:
    """Return ``length`` elements of a fragment from its ``begin``-th on, placed at ``start``."""
    assert not fragment.run
    if not 0 <= begin <= begin + length <= fragment.length:
        raise Unreadable(
            f"{fragment.path} holds {fragment.length} elements, where {begin + length} are needed"
        )
    return Fragment(fragment.path, fragment.offset_bytes + begin * itemsize, start, length)


def describe(source: Path | BinaryIO | io.RawIOBase, ignored: Iterable[str] = ()) -> Any:
    """Return what `torch.save` wrote, with tensors that have a shape, a dtype and no data.

    Nothing but tensors and plain values is allowed; the classes named in ``ignored`` become empty
    objects, and their code is not run. Raises Unreadable for anything else.
    """
    stand_ins: list[Any] = [(_Ignored, name) for name in ignored]
    try:
        # Those that are allowed are a list of the whole process, and threads read checkpoints.
        with _LOADING, torch.serialization.safe_globals(stand_ins), FakeTensorMode():
            return torch.load(cast(Any, source), map_location="cpu", weights_only=True)
    except Exception as error:
        name = getattr(source, "name", source)
        reason = why_refused(error)
        # Not the advice of torch, which is to allow the class.
        remedy = (
            "; if you trust its origin, load it with weights_only=False and save its weights alone"
            if "GLOBAL" in reason
            else ""
        )
        raise Unreadable(f"{name} is refused: {reason}{remedy}") from None


_LOADING = Lock()


def why_refused(error: Exception) -> str:
    """Return the one line of torch.load's message that tells what a file asked for."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # It begins with the advice to allow code, which is no advice for a file of unknown origin.
    telling = (line for line in lines if "GLOBAL" in line or line.startswith("Unsupported"))
    line = next(telling, lines[0] if lines else type(error).__name__)
    if line.startswith("Unsupported operand"):  # of a pickle, which it then is not
        return f"it is not a file that torch.save wrote, or is damaged ({line})"
    return line.partition(". Please use ")[0]


class _Ignored:
    """Stands in for a class whose code is not run; keeps what an object of it is made from."""

    arguments: tuple[Any, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> _Ignored:
        made = object.__new__(cls)
        made.arguments = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class PortableState:
    """A checkpoint's tensors by parameter name, whatever engine wrote them."""

    weights: Mapping[str, LazyTensor]
    """Master weights, or 16-bit copies where the checkpoint has no masters, as the dtype says.

    Tied ones stand under one name or, of the same fragments, under each.
    """
    moments: Mapping[str, Mapping[str, LazyTensor]]
    """The optimizer's tensors of each parameter, such as exp_avg."""
    scalars: Mapping[str, Mapping[str, float]]
    """The optimizer's numbers of each parameter, such as step."""
    buffers: Mapping[str, LazyTensor] = field(default_factory=dict)
    """Persistent buffers, where the files tell them from weights; else they are among those."""
    ema: Mapping[str, LazyTensor] = field(default_factory=dict)
    """An average of the weights, where the checkpoint keeps one."""
    origin: str = ""
    """What wrote it, in a phrase for people, such as "DeepSpeed ZeRO stage 2, 4 ranks"."""
    step: int | None = None
    """The optimizer's steps by then, where the files say it."""
