"""Optimizer state out of a checkpoint into a live optimizer: what the engines have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from shardwright.train.checkpoint.format.lazy import LazyTensor, PortableState
from shardwright.train.errors import UserError
from shardwright.train.optimizer import custom, eight_bit
from shardwright.train.optimizer.build import keeps_state


def check_names(
    state: PortableState, names: Iterable[str], optimizer: torch.optim.Optimizer
) -> None:
    """Raise UserError where the checkpoint has no state of some parameter, and there is one."""
    if not keeps_state(optimizer):
        return
    missing = [name for name in names if name not in state.moments and name not in state.scalars]
    if missing:
        others = f" and of {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"the checkpoint holds no optimizer state of {missing[0]}{others}; to continue from "
            "its weights alone, recover them and start a run with model=pretrained"
        )


def restore_whole(
    optimizer: torch.optim.Optimizer,
    state: PortableState,
    parameters: Mapping[str, torch.Tensor],
) -> None:
    """Fill an optimizer that steps whole tensors, ``parameters`` by name."""
    for name, parameter in parameters.items():

        def whole(
            tensor: LazyTensor, dtype: torch.dtype, like: torch.Tensor = parameter
        ) -> torch.Tensor:
            return tensor.whole().to(like.device, dtype)

        optimizer.state[parameter] = entries(optimizer, parameter, state, name, whole)


def entries(
    optimizer: torch.optim.Optimizer,
    parameter: torch.Tensor,
    state: PortableState,
    name: str,
    take: Callable[[LazyTensor, torch.dtype], torch.Tensor],
) -> dict[str, Any]:
    """Return one parameter's optimizer state; ``take`` gives this rank's part in a dtype."""
    custom.check_state(optimizer, name, state.moments.get(name, {}))
    scalars = {
        kind: scalar(optimizer, parameter, value)
        for kind, value in state.scalars.get(name, {}).items()
    }
    moments = {}
    for kind, tensor in state.moments.get(name, {}).items():
        if eight_bit.in_use(optimizer):
            values = take(tensor, torch.float32)
            moments[kind] = eight_bit.quantised(optimizer, parameter, kind, values)
        else:
            moments[kind] = take(tensor, parameter.dtype)
    return {**scalars, **moments}


def scalar(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, value: float) -> Any:
    """Return a number, such as the step count, in the form in which the optimizer keeps it."""
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return int(value)
    # Fused optimizers count on the device, torch's others on the CPU.
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return torch.tensor(value, dtype=torch.float32, device=parameter.device if fused else "cpu")


def restore_flat(
    optimizer: torch.optim.Optimizer,
    flat: torch.Tensor,
    state: PortableState,
    pieces: Iterable[tuple[str, int, int, int]],
) -> None:
    """Fill the state of one flat partition out of pieces of many parameters; the rest is padding.

    A piece is a parameter's name, its first element there, how many, and their place in ``flat``.
    Raises UserError where the checkpoint's optimizer state has another shape than its parameters.
    """
    found: dict[str, Any] = {}
    for name, start, length, place in pieces:
        custom.check_state(optimizer, name, state.moments.get(name, {}))
        for kind, value in state.scalars.get(name, {}).items():
            found[kind] = scalar(optimizer, flat, value)
        for kind, tensor in state.moments.get(name, {}).items():
            if tensor.shape != state.weights[name].shape:
                raise UserError(
                    f"the checkpoint's optimizer has a {kind} of shape {tensor.shape} for {name} "
                    f"of {state.weights[name].shape}, which cannot be laid out in ZeRO's flat "
                    "partitions; resume with strategy=ddp or zero0"
                )
            if kind not in found:
                found[kind] = torch.zeros_like(flat, requires_grad=False)
            found[kind][place : place + length].copy_(tensor.read(start, start + length))
    if found:
        optimizer.state[flat] = found
