"""An optimizer of the user's own makes some steps of two small tensors, as its engine has it.

A checkpoint carries its state from engine to engine, so that all of it has to be tensors of its
parameter's shape, and numbers. Whatever else its next step depends on would be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwright.train.config import TrainerConfig
from shardwright.train.own_parts import Part, load, part, said

KEY = "trainer.custom_class"
SHAPES = ((8, 6), (6,))
"""Of a tensor that decays, and of one that does not."""
STEPS = 2
TOLERANCE = 1e-5


class State(NamedTuple):
    """What an optimizer keeps of each parameter, by its own names."""

    moments: frozenset[str]
    """Tensors of the parameter's shape."""
    numbers: frozenset[str]


def of(trainer: TrainerConfig, *, is_flat: bool) -> State:
    """Return what the optimizer keeps. Raises UserError where a run cannot be trained by it.

    ``is_flat`` is whether it gets parts of many parameters, laid end to end.
    """
    asked = _part(trainer)
    whole = _Tried(trainer, [torch.randn(shape, generator=_random(0)) for shape in SHAPES])
    if is_flat and whole.optimizer.state:
        raise asked.wrong(
            "it keeps state of its parameters before its first step, and ZeRO puts others in their "
            "place; make it in the first step, or choose strategy=fsdp, ddp or zero0"
        )
    _check_groups(asked, trainer, whole)
    for number in range(STEPS):
        whole.step(number)
    _check_moved(asked, whole)
    keeps = _state(asked, whole)
    if len(keeps.moments) != trainer.custom_moments:
        raise asked.wrong(
            f"it keeps {len(keeps.moments)} tensors of each parameter "
            f"({', '.join(sorted(keeps.moments)) or 'none'}), but trainer.custom_moments="
            f"{trainer.custom_moments}; set trainer.custom_moments={len(keeps.moments)}"
        )
    _check_resumed(asked, trainer, whole)
    if is_flat:
        _check_flat(asked, trainer)
    _check_rate(asked, whole)
    return keeps


def made(trainer: TrainerConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the user's optimizer of groups of parameters; raise UserError where there is none."""
    asked = _part(trainer)
    make = load(KEY, str(trainer.custom_class))
    try:
        found = make(list(groups), lr=trainer.learning_rate, **trainer.custom_options)
    except Exception as error:  # whatever code of the user's raises
        options = ", ".join(["lr", *trainer.custom_options])
        raise asked.wrong(
            f"it cannot be made of groups of parameters and {options}: {said(error)}; correct it, "
            "or trainer.custom_options"
        ) from error
    if not isinstance(found, torch.optim.Optimizer):
        raise asked.wrong(
            f"it gives {type(found).__name__}, and is to give a torch.optim.Optimizer"
        )
    return found


def _part(trainer: TrainerConfig) -> Part:
    return part(KEY, str(trainer.custom_class))


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Tried:
    """Some tensors and the optimizer of them."""

    def __init__(self, trainer: TrainerConfig, values: Sequence[Tensor]) -> None:
        self._part = _part(trainer)
        self.parameters = [torch.nn.Parameter(value.clone()) for value in values]
        self.before = [value.clone() for value in values]
        decays = [trainer.weight_decay] + [0.0] * (len(values) - 1)
        self.optimizer = made(
            trainer,
            [
                {"params": [parameter], "weight_decay": decay, "algorithm": ""}
                for parameter, decay in zip(self.parameters, decays, strict=True)
            ],
        )

    def step(self, number: int, gradients: Sequence[Tensor] | None = None) -> None:
        given = gradients or [_gradient(number, p.shape) for p in self.parameters]
        for parameter, gradient in zip(self.parameters, given, strict=True):
            parameter.grad = gradient.clone()
        try:
            self.optimizer.step()
        except Exception as error:  # whatever code of the user's raises
            raise self._part.wrong(
                f"its step failed in a trial of two small tensors: {said(error)}"
            ) from error


def _gradient(number: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=_random(100 + number))


def _check_groups(asked: Part, trainer: TrainerConfig, tried: _Tried) -> None:
    groups = tried.optimizer.param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    if sorted(held) != sorted(map(id, tried.parameters)):
        raise asked.wrong("its param_groups do not hold the parameters that it was given")
    if any("lr" not in group for group in groups):
        raise asked.wrong("its param_groups have no lr, by which the schedule acts")
    if trainer.weight_decay and "weight_decay" not in tried.optimizer.defaults:
        raise asked.wrong(
            f"it has no setting weight_decay, but trainer.weight_decay={trainer.weight_decay:g}; "
            "set trainer.weight_decay=0"
        )


def _check_moved(asked: Part, tried: _Tried) -> None:
    for parameter, before in zip(tried.parameters, tried.before, strict=True):
        if parameter.shape != before.shape or parameter.dtype != before.dtype:
            raise asked.wrong("its step changes the shape or dtype of parameters")
        if torch.equal(parameter, before):
            raise asked.wrong(
                f"{STEPS} steps with lr={tried.optimizer.param_groups[0]['lr']:g} leave parameters "
                "as they are; it is to change them in place"
            )


def _state(asked: Part, tried: _Tried) -> State:
    moments: set[str] = set()
    numbers: set[str] = set()
    for parameter in tried.parameters:
        for name, value in tried.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments.add(name)
            elif isinstance(value, int | float) or (isinstance(value, Tensor) and not value.dim()):
                numbers.add(name)
            else:
                shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
                raise asked.wrong(
                    f"it keeps {name}, {type(value).__name__}{shape}, of a parameter of shape "
                    f"{tuple(parameter.shape)}; a checkpoint carries tensors of the parameter's "
                    "own shape, and numbers, from engine to engine"
                )
    if both := moments & numbers:
        raise asked.wrong(f"{min(both)} is a tensor of one parameter and a number of another")
    return State(frozenset(moments), frozenset(numbers))


def _check_resumed(asked: Part, trainer: TrainerConfig, tried: _Tried) -> None:
    """Raise UserError where a step after a resume is not the one that would have been."""
    resumed = _Tried(trainer, [parameter.detach() for parameter in tried.parameters])
    for mine, its in zip(resumed.parameters, tried.parameters, strict=True):
        resumed.optimizer.state[mine] = {
            name: value.clone()
            if isinstance(value, Tensor) and value.dim()
            else torch.tensor(float(value), dtype=torch.float32)
            for name, value in tried.optimizer.state.get(its, {}).items()
        }
    tried.step(STEPS)
    resumed.step(STEPS)
    pairs = zip(resumed.parameters, tried.parameters, strict=True)
    if not all(torch.equal(mine, its) for mine, its in pairs):
        raise asked.wrong(
            "its next step depends on more than the state of each parameter (optimizer.state), "
            "which is what a checkpoint carries, as tensors of the parameter's dtype and numbers "
            "in fp32; keep there what it counts, too"
        )


def _check_flat(asked: Part, trainer: TrainerConfig) -> None:
    """Raise UserError where parts of a tensor are not updated as they are within the whole."""
    value = torch.randn(SHAPES[0], generator=_random(0))
    whole = _Tried(trainer, [value])
    for number in range(STEPS):
        whole.step(number)
    found = []
    for places in (slice(0, 20), slice(20, None)):
        tried = _Tried(trainer, [value.flatten()[places]])
        for number in range(STEPS):
            tried.step(number, [_gradient(number, value.shape).flatten()[places]])
        found.append(tried.parameters[0].detach())
    expected = whole.parameters[0].detach().flatten()
    if not torch.allclose(torch.cat(found), expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise asked.wrong(
            "it does not update each element of a matrix by itself, and ZeRO's stages 1 to 3 give "
            "it parts of flattened parameters; choose strategy=fsdp, ddp or zero0"
        )


def _check_rate(asked: Part, tried: _Tried) -> None:
    """Raise UserError where a schedule would not act."""
    for group in tried.optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in tried.parameters]
    tried.step(STEPS + 1)
    if not all(map(torch.equal, before, tried.parameters)):
        raise asked.wrong(
            "its step moves parameters though the lr of their groups is 0; it is to read lr from "
            "param_groups in each step, where the schedule puts it"
        )
