"""Other values of the weights for forward passes: put together out of the parts that ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

Part = tuple[str, int, torch.Tensor]
"""A parameter's name, the first element's place in it, and consecutive elements."""


@torch.no_grad()
def show_whole(parameters: Mapping[str, torch.Tensor], parts: Iterable[Part]) -> None:
    """Give whole parameters the values of which each rank has ``parts``, one at a time. Collective.

    Each element is in the parts of one rank.
    """
    mine = _by_name(parts)
    for name, parameter in parameters.items():
        found = filled(parameter.numel(), parameter.device, mine.get(name, ()))
        if dist.is_initialized() and dist.get_world_size() > 1:
            joined(found)
        parameter.data.copy_(found.view(parameter.shape))


@torch.no_grad()
def show_sharded(
    locals_: Mapping[str, tuple[int, torch.Tensor]], parts: Iterable[Part], replicas: Any = None
) -> None:
    """Do the same with this rank's part of each parameter, from an element on.

    ``replicas`` is the group of the ranks that hold the same part, where there are several.
    """
    mine = _by_name(parts)
    for name, (begin, local) in locals_.items():
        here = [(start - begin, values) for start, values in mine.get(name, ())]
        device = local.device
        if replicas is not None and dist.get_backend(replicas) == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        found = filled(local.numel(), device, here)
        if replicas is not None:
            joined(found, replicas)
        local.detach().copy_(found.view(local.shape))


def filled(
    count: int, device: torch.device, parts: Iterable[tuple[int, torch.Tensor]]
) -> torch.Tensor:
    """Return a flat tensor in fp32 that has these elements, and zeros elsewhere."""
    found = torch.zeros(count, dtype=torch.float32, device=device)
    for start, values in parts:
        found[start : start + values.numel()].copy_(values)
    return found


def joined(values: torch.Tensor, group: Any = None) -> None:
    """Add up in place what ranks have, where all but one have zeros. Collective.

    As integers, of which the sum has the bits of the one: -0.0 + 0.0 would be 0.0.
    """
    dist.all_reduce(values.view(torch.int32), group=group)


def _by_name(parts: Iterable[Part]) -> dict[str, list[tuple[int, torch.Tensor]]]:
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, start, values in parts:
        found.setdefault(name, []).append((start, values))
    return found
