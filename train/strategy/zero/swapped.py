"""ZeRO-3's optimizer state on NVMe: corrected, measured, filled, mapped for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerStateSwapInfo


def align_gradients(zero: Any) -> None:
    """Have gradients come back from the disk to addresses that it can read to.

    DeepSpeed reads a parameter's gradient to where it lies in its sub-group, wherever that is. Read
    past the page cache, as DeepSpeed does, an address that is no multiple of the disk's sector is
    refused; and no error of a read or write is noticed (csrc/aio/common/deepspeed_aio_common.cpp,
    _do_io_complete, 0.19.8, drops each event's result). So all but the first parameter of a
    sub-group were trained with what the buffer held before.
    """
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is None:
        return

    def cut(
        tensors: Sequence[torch.Tensor], offsets: Sequence[int]
    ) -> tuple[list[torch.Tensor], list[int]]:
        """Cut gradients where the disk can begin and end; what is cut off stays in memory."""
        pieces = []
        for tensor, offset in zip(tensors, offsets, strict=True):
            for start, length in sections(offset, tensor.numel(), swapper.numel_alignment):
                pieces.append((tensor.narrow(0, start, length), offset + start))
        return [tensor for tensor, _ in pieces], [offset for _, offset in pieces]

    swapper._adjust_for_misaligned_lengths = cut


def sections(offset: int, length: int, alignment: int) -> list[tuple[int, int]]:
    """Return start and length of a range's head, aligned middle and tail, without empty ones. Pure.

    ``offset`` is where the range lies; all are counted in elements.
    """
    head = min(-offset % alignment, length)
    middle = (length - head) // alignment * alignment
    cuts = ((0, head), (head, middle), (head + middle, length - head - middle))
    return [(start, count) for start, count in cuts if count]


def elements(zero: Any) -> int:
    """Return how many of this rank's master weights lie on the disk."""
    return sum(info.numel() for info in zero.optimizer_swapper.swap_params_info.values())


@contextmanager
def in_memory(zero: Any, index: int) -> Iterator[None]:
    """Hold a sub-group's masters and moments in memory, where they may be changed or added.

    ``zero`` is the optimizer of any stage. What goes back to the disk afterwards is what DeepSpeed
    itself reads there at the next step.
    """
    if _on_disk(zero, index) is None:
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(index)
    yield
    zero._optimizer_states_and_gradient_swap_out(index)


def masters(zero: Any, partitions: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield flat master weights, those on the disk as mapped files: they take no memory."""
    for index, flat in enumerate(partitions):
        info = _on_disk(zero, index)
        yield flat if info is None else _mapped(info, flat)


def mapped(zero: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer's state_dict with what is on the disk in it, as if it were in memory.

    These tensors are mapped files: they take no memory, and hold the values of this step until the
    next begins. DeepSpeed's own dictionary has empty tensors in their place.
    """
    masters = list(state["fp32_flat_groups"])
    inner = dict(state["optimizer_state_dict"])
    inner["state"] = dict(inner["state"])
    for index, flat in enumerate(masters):
        info = _on_disk(zero, index)
        if info is None:
            continue
        masters[index] = _mapped(info, flat)
        moments = inner["state"].get(index, {})
        inner["state"][index] = {kind: _mapped(info, value) for kind, value in moments.items()}
    return {**state, "fp32_flat_groups": masters, "optimizer_state_dict": inner}


def _mapped(info: OptimizerStateSwapInfo, value: Any) -> Any:
    for tensor in info.tensors:
        if tensor.compute_tensor is value:
            path, elements = tensor.swap_path, info.numel()
            return torch.from_file(path, shared=False, size=elements, dtype=info.dtype())
    return value  # a number of steps


def _on_disk(zero: Any, index: int) -> OptimizerStateSwapInfo | None:
    """Return where a sub-group lies; None where it is in memory, being too small or not offloaded.

    Of a size below ``strategy.aio.block_size_bytes``, or a MiB, none goes to the disk
    (deepspeed/runtime/swap_tensor/optimizer_utils.py, is_swappable_tensor, 0.19.8).
    """
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is None:
        return None
    return swapper.swap_params_info.get(zero.fp32_partitioned_groups_flat[index].ds_id)
