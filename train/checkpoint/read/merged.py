"""A checkpoint that holds an adapter, as one of whole weights: its base with the adapter added.

The arithmetic is that of peft's `merge_and_unload` (0.21). Elements are computed as they are read,
so that no more of a weight is in memory than is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from shardwright.train.checkpoint.format.layout import AdapterEntry
from shardwright.train.checkpoint.format.lazy import Fragment, LazyTensor, PortableState, Unreadable

NAME = "default"
"""What the adapter is called among those that a model may have."""
_ROWS_BYTES = 2**22
"""Of a weight whose lengths are taken, how much is read at a time."""
_CACHED_ELEMENTS = 2**16
"""How many elements of a product are added to at a time: so many stay in a core's cache."""
_BASE = ".base_layer."
_SAVED = f".modules_to_save.{NAME}."
_ORIGINAL = ".original_module."
_OWN = re.compile(rf"\.(lora_A|lora_B|lora_magnitude_vector|ia3_l)\.{NAME}(\.weight)?$")


def is_of_adapter(name: str) -> bool:
    """Return whether a parameter by its name is trained with an adapter. Pure."""
    return _SAVED in name or _OWN.search(name) is not None


def adapters_tensors(state: PortableState) -> dict[str, LazyTensor]:
    """Return what peft keeps of a checkpoint's adapter, by the names that its files have."""
    return {_in_peft(name): tensor for name, tensor in state.weights.items() if is_of_adapter(name)}


def _in_peft(name: str) -> str:
    if _SAVED in name:
        return f"base_model.model.{name.replace(_SAVED, '.')}"
    found = _OWN.search(name)
    assert found is not None
    # Of those, only matrices are layers of their own.
    suffix = ".weight" if found[1] in ("lora_A", "lora_B") else ""
    return f"base_model.model.{name[: found.start()]}.{found[1]}{suffix}"


def whole(name: str) -> str | None:
    """Return a parameter's name in the model without its adapter; None for what it lacks. Pure."""
    if _OWN.search(name) is not None or _ORIGINAL in name:
        return None
    return name.replace(_BASE, ".").replace(_SAVED, ".")


def merged(state: PortableState, adapter: AdapterEntry) -> PortableState:
    """Return the state of the model without its adapter, which is in its weights.

    What training needs besides is not there. Weights of 16 bits that stayed as they were are in
    fp32, in which they are added to.
    """
    weights = {}
    for name, tensor in state.weights.items():
        plain = whole(name)
        if plain is not None:
            weights[plain] = _merged(name, tensor, state.weights, adapter)
    return replace(state, weights=weights, moments={}, scalars={}, ema={})


def _merged(
    name: str, tensor: LazyTensor, weights: Mapping[str, LazyTensor], adapter: AdapterEntry
) -> LazyTensor:
    layer, is_base, attribute = name.rpartition(_BASE)
    if is_base and (factors := weights.get(f"{layer}.ia3_l.{NAME}")) is not None:
        of_inputs = layer in adapter.feedforward
        if attribute == "weight" or not of_inputs:
            by_rows = attribute == "bias" or of_inputs == (layer in adapter.transposed)
            return _Multiplied(
                tensor.shape, torch.float32, tensor.fragments, tensor, factors, by_rows
            )
    elif is_base and attribute == "weight":
        a, b = (weights.get(f"{layer}.lora_{which}.{NAME}.weight") for which in "AB")
        if a is not None and b is not None:
            return _Added(
                tensor.shape,
                torch.float32,
                tensor.fragments,
                tensor,
                a,
                b,
                adapter.scaling,
                layer in adapter.transposed,
                weights.get(f"{layer}.lora_magnitude_vector.{NAME}.weight"),
            )
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4:
        return _Computed(tensor.shape, torch.float32, tensor.fragments, tensor)
    return tensor


@dataclass(frozen=True)
class _Computed(LazyTensor):
    """A tensor in fp32 whose elements are computed of those of another one of its shape."""

    base: LazyTensor

    def __post_init__(self) -> None:
        """Its base has been looked at."""

    def read(
        self, start: int = 0, stop: int | None = None, buffer: torch.Tensor | None = None
    ) -> torch.Tensor:
        stop = self.numel if stop is None else stop
        found = self._computed(self.base.read(start, stop).float(), start, stop)
        if buffer is None:
            return found
        result = buffer[: (stop - start) * 4].view(torch.float32)
        result.copy_(found)
        return result

    def cut(self, start: int, length: int, at: int) -> Iterator[Fragment]:
        raise Unreadable("a weight that an adapter is added to lies in no file as it is")

    def _computed(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return elements from start to stop, of those of the base, in the same memory or not."""
        return values

    def _rows(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first row and the one behind the last that hold elements of these."""
        return start // self.shape[1], -(-stop // self.shape[1])


@dataclass(frozen=True)
class _Multiplied(_Computed):
    """IA3: each row, or each column, by its factor."""

    factors: LazyTensor
    by_rows: bool

    def _computed(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        factors = self.factors.read().float()
        if len(self.shape) == 1:
            return values.mul_(factors[start:stop])
        columns = self.shape[1]
        at = torch.arange(start, stop)
        return values.mul_(factors[at // columns if self.by_rows else at % columns])


@dataclass(frozen=True)
class _Added(_Computed):
    """LoRA: W + scaling * B A; DoRA: that, with each output's weights brought to a length."""

    a: LazyTensor
    b: LazyTensor
    scaling: float
    transposed: bool
    """Whether the weight has a row for each input, as transformers' Conv1D has."""
    magnitudes: LazyTensor | None

    def _computed(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        added = self._sum(values, start, stop)
        if self.magnitudes is None:
            return added
        columns = self.shape[1]
        factors = self.magnitudes.read().float() / self._lengths()
        at = torch.arange(start, stop)
        return added.mul_(factors[at % columns if self.transposed else at // columns])

    def _sum(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        (first, last), columns = self._rows(start, stop), self.shape[1]
        if self.transposed:  # (B A)^T has a row for each column of A
            product = _product(self.a.whole().float()[:, first:last].T, self.b.whole().float().T)
        else:
            rank = self.b.shape[1]
            rows = self.b.read(first * rank, last * rank).view(-1, rank).float()
            product = _product(rows, self.a.whole().float())
        offset = start - first * columns
        # Apart from the addition, which else some instructions round together with it.
        product.mul_(self.scaling)
        return values.add_(product.view(-1)[offset : offset + stop - start])

    def _lengths(self) -> torch.Tensor:
        """Return the length of each output's weights with what is added, in one pass over them."""
        kept: torch.Tensor | None = self.__dict__.get("_kept_lengths")
        if kept is not None:
            return kept
        rows, columns = self.shape
        squares = torch.zeros(columns if self.transposed else rows)
        step = max(1, _ROWS_BYTES // (4 * columns))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            start, stop = first * columns, last * columns
            values = self._sum(self.base.read(start, stop).float(), start, stop)
            square = values.view(-1, columns).square()
            if self.transposed:
                squares += square.sum(0)
            else:
                squares[first:last] = square.sum(1)
        # Of several threads each would find the same.
        self.__dict__["_kept_lengths"] = lengths = squares.sqrt_()
        return lengths


def _product(rows: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return the product of two thin matrices, to the same bits whatever rows are asked for. Pure.

    A library's product of some rows differs in the last bit from those rows of a larger product,
    and with the number of threads: what ranks write together would not be what one process does.
    """
    rank, columns = a.shape
    found = torch.zeros(rows.shape[0], columns)
    at_once = max(1, _CACHED_ELEMENTS // columns)
    scratch = torch.empty(at_once, columns)
    for of_rows, of_found in zip(rows.split(at_once), found.split(at_once), strict=True):
        added = scratch[: of_rows.shape[0]]
        for index in range(rank):
            torch.mul(of_rows[:, index : index + 1], a[index], out=added)
            of_found += added
    return found
