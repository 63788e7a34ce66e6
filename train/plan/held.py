"""What a rank holds of a training, by category: found among all tensors that are alive."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from shardwright.train.model import quantised

if TYPE_CHECKING:
    from shardwright.train.strategy.training import Training

Storages = dict[tuple[str, int], int]
"""Bytes of each storage by its device's type and address: tensors that share one count once."""
CATEGORIES = ("parameters", "gradients", "optimizer")
NOTHING: Mapping[tuple[str, int], int] = {}


def held(
    training: Training, before: Mapping[tuple[str, int], int] = NOTHING
) -> dict[str, dict[str, int]]:
    """Return the bytes of each category by the type of device on which they lie. Not collective.

    Gradients, with the buckets that wait for them, are whatever floats are alive and are neither
    parameters, optimizer state nor buffers of the model: engines keep theirs in many places. So
    they are to be looked for between two micro-batches, when there are no activations. ``before``
    is what was alive before the training, and no part of it.
    """
    gc.collect()
    parameters = storages(local(p) for p in training.model.parameters())
    parameters |= storages(quantised.scales(training.model))
    optimizer = storages(_of_optimizer(training))
    # In fp32 the optimizer updates the parameters themselves.
    optimizer = {k: v for k, v in optimizer.items() if k not in parameters}
    buffers = storages(training.model.buffers())
    known = {**before, **parameters, **optimizer, **buffers}
    gradients = {k: v for k, v in alive().items() if k not in known}
    found: dict[str, dict[str, int]] = {}
    for category, each in zip(CATEGORIES, (parameters, gradients, optimizer), strict=True):
        for (device, _), size in each.items():
            of_device = found.setdefault(device, dict.fromkeys(CATEGORIES, 0))
            of_device[category] += size
    return found


def alive() -> Storages:
    """Return the floats that are alive in Python; a tensor that only C++ holds does not show."""
    plain = [local(t) for t in tensors() if t.is_floating_point()]
    # An attribute of a tensor is not an object that gc tracks.
    plain += [t.grad for t in plain if t.is_leaf and t.grad is not None]
    return storages(plain)


def tensors() -> Iterator[torch.Tensor]:
    """Yield all tensors that Python knows and that have values."""
    for found in gc.get_objects():
        # Not isinstance, which asks proxies for their class, and some of them raise.
        if issubclass(type(found), torch.Tensor) and type(found).__name__ != "FakeTensor":
            with suppress(RuntimeError, NotImplementedError):
                if found.device.type != "meta":
                    yield found


def storages(among: Iterable[torch.Tensor]) -> Storages:
    """Return what holds the values of tensors, without what is empty."""
    found: Storages = {}
    for tensor in among:
        # Sparse tensors, and those of a compiler, have none.
        with suppress(RuntimeError, NotImplementedError):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[tensor.device.type, storage.data_ptr()] = storage.nbytes()
    return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor that may be sharded."""
    if hasattr(tensor, "ds_tensor"):  # ZeRO-3
        part: torch.Tensor = tensor.ds_tensor
        return part
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _of_optimizer(training: Training) -> Iterator[torch.Tensor]:
    optimizer = training.innermost_optimizer()
    for group in optimizer.param_groups:
        yield from (local(p) for p in group["params"])
    for state in optimizer.state.values():
        yield from (local(v) for v in state.values() if isinstance(v, torch.Tensor))
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        yield from getattr(training.torch_optimizer(), name, [])
