"""Recompute what is cheap of a block, and keep what its products of matrices and attention give.

torch has this too (torch.utils.checkpoint, create_selective_checkpoint_contexts), which is taken
where a block is compiled. Elsewhere it is not: it draws other dropout after an operation that is
not run again and that draws random numbers, as attention with dropout does; and it raises where the
second run has other operations than the first (2.13), as hooks that gather weights have.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm")
_BATCHED = {"aten::bmm": 0, "aten::baddbmm": 1}
"""Where the first of the two matrices stands among the arguments."""
_ATTENTION = (
    *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention"),
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    *("aten::_flash_attention_forward", "aten::_efficient_attention_forward"),
    *("torch_attn::_varlen_attn", "flex_attention"),
)
_FLASH_ATTENTION = "flash_attn::"
"""What begins so is of the package of that name, or of its like out of a hub."""


def is_kept(operation: Any, arguments: Sequence[Any]) -> bool:
    """Return whether what an operation gives is kept for the backward pass. Pure.

    Collectives are not, nor what copies: a second run gathers weights again. The scores of
    attention without a kernel of its own are not either, as they are larger than what they are
    made of.
    """
    name = _name(operation)
    if name in _BATCHED:
        first = _BATCHED[name]
        left, right = arguments[first], arguments[first + 1]
        return bool(left.shape[-2] * right.shape[-1] <= left[0].numel() + right[0].numel())
    is_flash = name.startswith(_FLASH_ATTENTION) and "backward" not in name
    return name in _PRODUCTS or name in _ATTENTION or is_flash


@functools.cache
def _name(operation: Any) -> str:
    name = operation.name
    return str(name() if callable(name) else name)


def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return what a block runs in the first time, and the second: the argument ``context_fn``."""
    kept = Kept()
    return _Keep(kept), _Reuse(kept)


def contexts_to_compile() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the same of torch's own, from which its compiler reads what is to be kept."""

    def policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        found = is_kept(operation, arguments)
        return CheckpointPolicy.MUST_SAVE if found else CheckpointPolicy.PREFER_RECOMPUTE

    found: tuple[AbstractContextManager, AbstractContextManager] = (
        create_selective_checkpoint_contexts(policy)
    )
    return found


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values, which a change in place counts for too: here, below autograd, only
    with the key that does so not left out."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class Kept:
    """What a block's operations have given, in their order, until it runs a second time."""

    def __init__(self) -> None:
        self._entries: defaultdict[Any, deque[_Entry]] = defaultdict(deque)
        self._of_storage: dict[int, _Entry] = {}

    def add(self, operation: Any, result: Any) -> None:
        values = tree_map_only(torch.Tensor, _detached, result)
        entry = _Entry(values, _versions(values), _rng_states(operation, values))
        self._entries[operation].append(entry)
        self._of_storage |= {_storage(tensor): entry for tensor in _tensors(values)}

    def copy_before_change(self, tensors: Sequence[torch.Tensor]) -> None:
        """Have what is kept stay as it is where one of its tensors is about to be changed.

        Versions do not tell of all changes: DeepSpeed's linear layer of ZeRO-3 adds the bias in
        place to a view that does not share its product's (0.19, runtime/zero/linear.py, by
        matmul's _unsafe_view in torch 2.13).
        """
        for tensor in tensors:
            if (entry := self._of_storage.get(_storage(tensor))) is not None:
                self._of_storage = {s: e for s, e in self._of_storage.items() if e is not entry}
                entry.values = tree_map_only(torch.Tensor, torch.clone, entry.values)
                entry.versions = _versions(entry.values)

    def end(self) -> None:
        """Have the first run be over: what a storage is for may change."""
        self._of_storage.clear()

    def take(self, operation: Any) -> Any:
        """Return what the operation has given, with the generators as they stood behind it."""
        entries = self._entries.get(operation)
        if not entries:
            raise RuntimeError(
                f"trainer.recompute=selective: {_name(operation)} runs more often when a block is "
                "recomputed than it did before, so the block is not the same; set "
                "trainer.recompute=full"
            )
        entry = entries.popleft()
        if _versions(entry.values) != entry.versions:
            raise RuntimeError(
                f"trainer.recompute=selective: what {_name(operation)} gives in a block is changed "
                "in place behind it, so it cannot be kept; set trainer.recompute=full"
            )
        for set_state, state in entry.rng_states:
            set_state(state)
        return entry.values

    @property
    def size_bytes(self) -> int:
        """The size of what is there."""
        entries = [entry for found in self._entries.values() for entry in found]
        tensors = _tensors([entry.values for entry in entries])
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@dataclass
class _Entry:
    values: Any
    versions: list[int]
    rng_states: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]]
    """The state of each generator after it, where it draws from any: what follows draws there."""


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _versions(values: Any) -> list[int]:
    return [tensor._version for tensor in _tensors(values)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _changed(
    operation: Any, arguments: Sequence[Any], options: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Return what of its arguments an operation changes in place."""
    schema = getattr(operation, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written = [
        arguments[i] if i < len(arguments) else options.get(argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return _tensors(written)


def _rng_states(
    operation: Any, values: Any
) -> list[tuple[Callable[[torch.Tensor], None], torch.Tensor]]:
    # An operation of higher order has no tags; nor has a package's own, which may draw.
    draws = torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ())
    if not draws and _name(operation).startswith("aten::"):
        return []
    states: list[Any] = [(torch.set_rng_state, torch.get_rng_state())]
    devices = {tensor.device for tensor in _tensors(values) if tensor.is_cuda}
    for device in devices:
        restore = functools.partial(torch.cuda.set_rng_state, device=device)
        states.append((restore, torch.cuda.get_rng_state(device)))
    return states


class _Keep(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if changed := _changed(func, args, kwargs or {}):
            self._kept.copy_before_change(changed)
        result = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            self._kept.add(func, result)
        return result

    def __exit__(self, *error: Any) -> None:
        self._kept.end()
        super().__exit__(*error)


class _Reuse(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if is_kept(func, args):
            return self._kept.take(func)
        return func(*args, **(kwargs or {}))
