"""Which elements of the tensors on a disk a model's are, where transformers converts them.

For some architectures it saves other tensors than the model has: the weights of each of Mixtral's
experts, which live in one tensor, or GPT-NeoX's head under another name. Its own conversion is run
on tensors that hold no values but know what they are made of, in both directions, so that weights
can be streamed from and to either.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from shardwright.train.checkpoint.format.lazy import Fragment, LazyTensor, Unreadable
from shardwright.train.checkpoint.format.outputs import Output, Place
from shardwright.train.model.directory import own_class

aten = torch.ops.aten

_MOST_PIECES = 2**20
"""More would be single elements of a transposed matrix, which are better loaded whole."""


class CannotTrace(Exception):
    """A tensor is made in a way that moves single elements or computes; the message says how."""


_refusals: ContextVar[list[CannotTrace] | None] = ContextVar("refusals", default=None)
"""What was raised: transformers makes a line of a table of it (5.23, log_conversion_errors)."""


class Piece(NamedTuple):
    """Consecutive elements of a flattened tensor, known by its name."""

    name: str
    start: int
    length: int


class Traced(torch.Tensor):
    """A tensor without values whose elements, in order, are those of its pieces."""

    pieces: tuple[Piece, ...]

    @staticmethod
    def __new__(cls, pieces: Iterable[Piece], shape: Iterable[int], dtype: torch.dtype) -> Traced:
        made = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device("meta")
        )
        made.pieces = _joined(pieces)
        return made

    @classmethod
    def named(cls, name: str, like: torch.Tensor) -> Traced:
        """Return all elements of the tensor of a name."""
        return cls([Piece(name, 0, like.numel())], like.shape, like.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Several overloads of one operation do the same here.
        operation = _OPERATIONS.get(function.overloadpacket)
        try:
            if operation is None:
                raise CannotTrace(f"it is computed ({function})")
            return operation(*args, **(kwargs or {}))
        except CannotTrace as refusal:
            if (refusals := _refusals.get()) is not None:
                refusals.append(refusal)
            raise


def _joined(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Return pieces with those joined that follow on one another. Raises CannotTrace."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and last.name == piece.name and last.start + last.length == piece.start:
            joined[-1] = last._replace(length=last.length + piece.length)
        elif piece.length:
            joined.append(piece)
        if len(joined) > _MOST_PIECES:
            raise CannotTrace("its elements are put into another order")
    return tuple(joined)


# --- operations on tensors that only move elements ----------------------------------------------


def _blocks(tensor: Traced, dim: int) -> tuple[int, int, int]:
    """Return a tensor's shape as rows, entries of a dimension, and elements of each entry."""
    shape = tensor.shape
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _cut(pieces: tuple[Piece, ...], ranges: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    """Yield what lies in ascending ranges (start, stop) of a tensor's elements."""
    at, end = 0, pieces[0].length if pieces else 0
    for start, stop in ranges:
        while start < stop:
            while end <= start:
                at += 1
                end += pieces[at].length
            piece = pieces[at]
            first = start - (end - piece.length)
            length = min(stop, end) - start
            yield Piece(piece.name, piece.start + first, length)
            start += length


def _narrowed(tensor: Traced, dim: int, start: int, length: int) -> Traced:
    rows, entries, width = _blocks(tensor, dim)
    if rows > _MOST_PIECES:
        raise CannotTrace("it is cut within its rows")
    ranges = (
        ((row * entries + start) * width, (row * entries + start + length) * width)
        for row in range(rows)
    )
    shape = (*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])
    return Traced(_cut(tensor.pieces, ranges), shape, tensor.dtype)


def _slice(
    tensor: Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Traced:
    if step != 1:
        raise CannotTrace("every other of its elements is left out")
    dim %= tensor.dim()
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    return _narrowed(tensor, dim, first, max(0, last - first))


def _split(tensor: Traced, sizes: int | list[int], dim: int = 0) -> list[Traced]:
    dim %= tensor.dim()
    entries = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, entries - at) for at in range(0, entries, sizes)]
    parts, at = [], 0
    for length in sizes:
        parts.append(_narrowed(tensor, dim, at, length))
        at += length
    return parts


def _select(tensor: Traced, dim: int, index: int) -> Traced:
    dim %= tensor.dim()
    return _without(_narrowed(tensor, dim, index % tensor.shape[dim], 1), dim)


def _unbind(tensor: Traced, dim: int = 0) -> list[Traced]:
    dim %= tensor.dim()
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _without(tensor: Traced, dim: int) -> Traced:
    shape = [*tensor.shape[:dim], *tensor.shape[dim + 1 :]]
    return Traced(tensor.pieces, shape, tensor.dtype)


def _squeeze(tensor: Traced, dim: int | list[int] | None = None) -> Traced:
    dims = range(tensor.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % tensor.dim() for d in dims}
    shape = [n for d, n in enumerate(tensor.shape) if d not in gone or n != 1]
    return Traced(tensor.pieces, shape, tensor.dtype)


def _unsqueeze(tensor: Traced, dim: int) -> Traced:
    shape = list(tensor.shape)
    shape.insert(dim % (tensor.dim() + 1), 1)
    return Traced(tensor.pieces, shape, tensor.dtype)


def _view(tensor: Traced, shape: list[int]) -> Traced:
    known = math.prod(n for n in shape if n != -1)
    shape = [tensor.numel() // known if n == -1 else n for n in shape]
    return Traced(tensor.pieces, shape, tensor.dtype)


def _cat(tensors: list[Traced], dim: int = 0) -> Traced:
    if not all(isinstance(tensor, Traced) for tensor in tensors):
        raise CannotTrace("it is joined with values of another origin")
    dim %= tensors[0].dim()
    rows = _blocks(tensors[0], dim)[0]
    if rows * len(tensors) > _MOST_PIECES:
        raise CannotTrace("its rows are joined")
    if rows == 1:
        pieces: Iterable[Piece] = (piece for tensor in tensors for piece in tensor.pieces)
    else:
        of_rows = []
        for tensor in tensors:
            _, entries, width = _blocks(tensor, dim)
            length = entries * width
            of_rows.append(
                [list(_cut(tensor.pieces, [(r * length, (r + 1) * length)])) for r in range(rows)]
            )
        pieces = (piece for r in range(rows) for of_row in of_rows for piece in of_row[r])
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return Traced(pieces, shape, tensors[0].dtype)


def _stack(tensors: list[Traced], dim: int = 0) -> Traced:
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], dim)


def _transpose(tensor: Traced, dim0: int, dim1: int) -> Traced:
    order = list(range(tensor.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(tensor, order)


def _permute(tensor: Traced, order: list[int]) -> Traced:
    order = [d % tensor.dim() for d in order]
    moved = max((d for d, old in enumerate(order) if d != old), default=-1) + 1
    width = math.prod(tensor.shape[moved:])
    blocks = math.prod(tensor.shape[:moved])
    if blocks > _MOST_PIECES:
        raise CannotTrace("it is transposed")
    places = torch.arange(blocks).view(tensor.shape[:moved]).permute(order[:moved]).flatten()
    of_block = [list(_cut(tensor.pieces, [(b * width, (b + 1) * width)])) for b in range(blocks)]
    pieces = (piece for place in places.tolist() for piece in of_block[place])
    return Traced(pieces, [tensor.shape[d] for d in order], tensor.dtype)


def _same(tensor: Traced, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Traced:
    return Traced(tensor.pieces, tensor.shape, dtype or tensor.dtype)


def _padded(tensor: Traced, widths: list[int], value: float = 0) -> Traced:
    if any(widths):
        raise CannotTrace("it is padded")
    return _same(tensor)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.slice: _slice,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.select: _select,
    aten.unbind: _unbind,
    aten.squeeze: _squeeze,
    aten.unsqueeze: _unsqueeze,
    aten.view: _view,
    aten._unsafe_view: _view,
    aten.reshape: _view,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.transpose: _transpose,
    aten.t: lambda tensor: _transpose(tensor, 0, 1),
    aten.permute: _permute,
    aten.constant_pad_nd: _padded,  # of a bias as long as it should be, too
    aten.detach: _same,
    aten.alias: _same,
    aten.clone: _same,
    aten._to_copy: _same,
    aten.contiguous: _same,
}


# --- from a model to a disk ---------------------------------------------------------------------


def placed(
    model: PreTrainedModel, outputs: Sequence[Output]
) -> tuple[list[Output], dict[str, tuple[Place, ...]]]:
    """Return what `save_pretrained` would write of some tensors, and which part of it each is.

    Raises CannotTrace.
    """
    live = {o.name: torch.empty(o.shape, dtype=o.dtype, device="meta") for o in outputs}
    written = on_disk(model, live)
    if written.keys() == live.keys():
        return list(outputs), {}
    places: dict[str, list[Place]] = {}
    for name, tensor in written.items():
        at = 0
        for piece in tensor.pieces:
            places.setdefault(piece.name, []).append(Place(piece.start, piece.length, name, at))
            at += piece.length
    return (
        [Output(name, tuple(tensor.shape), tensor.dtype) for name, tensor in written.items()],
        {name: tuple(sorted(of, key=lambda p: p.start)) for name, of in places.items()},
    )


def on_disk(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, Traced]:
    """Return what `save_pretrained` writes of a model's tensors, by its name in the files.

    Of ``tensors`` nothing but names, shapes and dtypes is looked at. Raises CannotTrace where some
    elements are written other than in runs.
    """
    live: dict[str, torch.Tensor] = {n: Traced.named(n, t) for n, t in tensors.items()}
    own: Any = own_class(model)
    if type(model) is not own:
        # transformers looks conversions up by the name of the class, and FSDP2 gives it another.
        with torch.device("meta"):
            model = own(model.config)
    written = revert_weight_conversion(model, live)
    made = {name: tensor for name, tensor in written.items() if isinstance(tensor, Traced)}
    sources = {piece.name for tensor in made.values() for piece in tensor.pieces}
    elements = sum(tensor.numel() for tensor in made.values())
    if sources != live.keys() or elements != sum(tensor.numel() for tensor in live.values()):
        raise CannotTrace("not every element is written just once")
    return made


# --- from a disk to a model ---------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """What `from_pretrained` makes of the tensors in some files."""

    tensors: Mapping[str, Traced]
    """By the model's own names; tied ones under each of theirs."""
    unexpected: list[str]
    """Names that it does not take, neither now nor in an older version of the model."""
    computed: list[str]
    """The model's names that it makes out of the files' tensors in a way that cannot be traced."""
    mismatched: list[tuple[str, Sequence[int], Sequence[int]]]
    """The model's names that have one shape in the files and another in the model."""


def assembled(tensor: Traced, files: Mapping[str, LazyTensor]) -> LazyTensor:
    """Return a traced tensor as one that can be read from the files of its pieces.

    Raises Unreadable.
    """
    shape = tuple(tensor.shape)
    if len(tensor.pieces) == 1 and files[tensor.pieces[0].name].numel == tensor.numel():
        only = files[tensor.pieces[0].name]
        return LazyTensor(shape, only.dtype, only.fragments)
    dtypes = {files[piece.name].dtype for piece in tensor.pieces}
    if len(dtypes) > 1:
        raise Unreadable(
            f"{tensor.pieces[0].name} and {tensor.pieces[-1].name} become one tensor of the model, "
            f"and are in {' and '.join(sorted(map(str, dtypes)))}"
        )
    fragments: list[Fragment] = []
    at = 0
    for piece in tensor.pieces:
        fragments += files[piece.name].cut(piece.start, piece.length, at)
        at += piece.length
    return LazyTensor(shape, dtypes.pop(), tuple(fragments))


class _InFile:
    """What safetensors calls a slice: a tensor that is read once it is indexed."""

    def __init__(self, name: str, like: torch.Tensor) -> None:
        self.tensor = Traced.named(name, like)

    def __getitem__(self, index: Any) -> Traced:
        return self.tensor


def loaded(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    *,
    ignore_mismatched_sizes: bool = False,
) -> Loaded:
    """Return of which tensors in files `from_pretrained` makes those of a model.

    Whatever it renames, strips, prefixes, splits and joins: it does so itself. Of ``tensors``
    nothing but names, shapes and dtypes is looked at. Raises CannotTrace where it moves single
    elements or computes, and what it raises where shapes differ, unless those are to be ignored.
    """
    refusals: list[CannotTrace] = []
    outer = _refusals.set(refusals)
    try:
        return _loaded(model, tensors, ignore_mismatched_sizes)
    except RuntimeError:
        if refusals:
            raise refusals[0] from None
        raise
    finally:
        _refusals.reset(outer)


def _loaded(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], ignore_mismatched_sizes: bool
) -> Loaded:
    state = {name: _InFile(name, tensor) for name, tensor in tensors.items()}
    with _quiet():
        made_and_info: Any = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            dtype=torch.float32,
            device_map="meta",
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=True,
        )
    made, info = made_and_info
    found, computed = {}, []
    for name, tensor in made.state_dict(keep_vars=True).items():
        if isinstance(tensor, Traced):
            found[name] = tensor
        elif (
            getattr(tensor, "_is_hf_initialized", False) and name not in made.all_tied_weights_keys
        ):
            computed.append(name)
    unexpected = sorted(map(str, info["unexpected_keys"]))
    return Loaded(found, unexpected, computed, list(info["mismatched_keys"]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own report of a load back, and its bar."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
