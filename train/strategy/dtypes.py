"""The names of dtypes, ours and torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.train.config.precision import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

TORCH_DTYPES = {name: dtype.torch_name for name, dtype in DTYPES.items()}
"""By our names."""
_NAMES = {theirs: ours for ours, theirs in TORCH_DTYPES.items()}


def dtype_names(dtypes: Iterable[Any]) -> str:
    """Return torch dtypes by our names, several joined by "+". Pure."""
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
    return "+".join(_NAMES.get(name, name) for name in names)


def moments_dtypes(optimizer: torch.optim.Optimizer, masters: Iterable[Any]) -> set[Any]:
    """Return the dtypes of the optimizer's running averages.

    Before the first step there may be none yet; they will take those of the master weights.
    torchao's 8-bit ones are tensors of a class of their own.
    """
    from shardwright.train.optimizer import eight_bit

    if eight_bit.in_use(optimizer):
        return {"8-bit"}
    averages = {
        value.dtype
        for state in optimizer.state.values()
        for value in state.values()
        if hasattr(value, "dtype") and value.ndim > 0
    }
    return averages or set(masters)
