"""Each parameter's first value, one whole tensor at a time: drawn anew or read from a checkpoint.

Models are built with their parameters on the meta device, and an engine gives them their values as
it shards them. So no rank ever holds more than its shards and one whole tensor.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS

Values = dict[str, Callable[[torch.Tensor], object]]
"""From a parameter's name, as `named_parameters` has it, to a function that writes its first value.

It writes into a whole tensor of the parameter's shape: fp32, contiguous, on the CPU. The value is
the same on every rank, in whatever order and however often it is written.
"""


# --- giving them to a model -----------------------------------------------------------------------


def in_turn(
    parameters: Iterable[tuple[str, nn.Parameter]],
    values: Values,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Yield each parameter with its name and its whole value, which the next one overwrites.

    All values lie in one buffer, and what they are cast to in another. Were each allocated by
    itself, what the caller allocates for it would come to lie between them on the heap, whose gaps
    are then too small for the next: that was measured to cost half as much again as the shards.
    """
    # ZeRO-3 leaves an empty tensor in place of a parameter and the whole shape beside it.
    parameters = list(parameters)
    shapes = [getattr(p, "ds_shape", p.shape) for _, p in parameters]
    largest = max(map(math.prod, shapes), default=0)  # a rank's partition may be all padding
    buffer = torch.empty(largest, dtype=torch.float32)
    cast = buffer if dtype == torch.float32 else torch.empty(largest, dtype=dtype)
    for (name, parameter), shape in zip(parameters, shapes, strict=True):
        whole = buffer[: math.prod(shape)].view(shape)
        values[name](whole)
        if cast is not buffer:
            whole = cast[: math.prod(shape)].view(shape).copy_(whole)
        yield name, parameter, whole


def materialize(model: nn.Module, values: Values, dtype: torch.dtype = torch.float32) -> None:
    """Replace the meta parameters by real ones on the CPU, one after the other."""
    owners = Owners(model)
    for name, parameter in list(model.named_parameters()):
        tensor = torch.empty(parameter.shape, dtype=torch.float32)
        values[name](tensor)
        owners.replace(parameter, tensor.to(dtype))


class Owners:
    """Which modules hold each parameter, so that tied ones stay one when they are replaced."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.setdefault(parameter, []).append((module, attribute))

    def replace(self, parameter: nn.Parameter, tensor: torch.Tensor) -> nn.Parameter:
        """Put a parameter of these data in the place of ``parameter`` everywhere; return it."""
        replacement = nn.Parameter(tensor, parameter.requires_grad)
        for module, attribute in self._places[parameter]:
            module._parameters[attribute] = replacement
        return replacement


def emptied(model: PreTrainedModel) -> tuple[PreTrainedModel, Values]:
    """Return a whole model with its parameters on the meta device, and their values."""

    def writing(tensor: torch.Tensor) -> Callable[[torch.Tensor], object]:
        return lambda out: out.copy_(tensor)

    values: Values = {}
    owners = Owners(model)
    for name, parameter in list(model.named_parameters()):
        values[name] = writing(parameter.detach())
        owners.replace(parameter, parameter.detach().to("meta"))
    return model, values


# --- drawn anew ----------------------------------------------------------------------------------


def initialized(build: Callable[[], PreTrainedModel], seed: int) -> tuple[PreTrainedModel, Values]:
    """Return a model whose parameters are on the meta device, and their initial values.

    The values follow the architecture's own initialisation, but each parameter is drawn by itself,
    as a function of ``seed`` and its name alone. Buffers (rotary frequencies, position ids) are
    real. What sets a parameter without `torch.nn.init` leaves it without a value.
    """
    with _parameters_on_meta() as recipes:
        model = build()
    return model, recipes.values(model, seed)


@dataclass(frozen=True)
class _Step:
    """A call of one function of `torch.nn.init` on a part of a parameter."""

    function: Callable[..., Any]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def repeat(self, whole: torch.Tensor, generator: torch.Generator) -> None:
        keywords = self.keywords
        if "generator" in inspect.signature(self.function).parameters:
            keywords = {**keywords, "generator": generator}
        part = whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)
        self.function(part, *self.arguments, **keywords)


class _Recipes:
    """The steps that make each parameter's initial value, noted while a model is built on meta."""

    def __init__(self) -> None:
        self._steps: dict[int, list[_Step]] = {}
        # None may be freed, as its id could be used again.
        self._seen: list[torch.Tensor] = []

    def noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of `torch.nn.init` that only notes its call where that is on meta."""

        def note(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            if not tensor.is_meta:
                return function(tensor, *arguments, **keywords)
            whole = tensor if tensor._base is None else tensor._base
            size, stride = tuple(tensor.shape), tuple(tensor.stride())
            offset = int(tensor.storage_offset())
            step = _Step(function, size, stride, offset, arguments, keywords)
            # Each of these functions overwrites: what was done to the whole before is void.
            earlier = [] if tensor.numel() == whole.numel() else self._steps.get(id(whole), [])
            self._steps[id(whole)] = [*earlier, step]
            self._seen.append(whole)
            return tensor

        return note

    def values(self, model: nn.Module, seed: int) -> Values:
        """Return the initial value of each parameter that a function of `torch.nn.init` has set."""
        values: Values = {}
        for name, parameter in model.named_parameters():
            steps = self._steps.get(id(parameter), [])
            if steps and math.prod(steps[0].size) == parameter.numel():
                values[name] = functools.partial(_draw, name, steps, seed)
        return values


def drawn(values: Values) -> list[str]:
    """Return the names of the parameters whose first value was not read from anywhere. Pure."""
    by = (_draw, drawn_at_load)
    return [name for name, write in values.items() if getattr(write, "func", None) in by]


def drawn_at_load(write: Callable[[torch.Tensor], object], out: torch.Tensor) -> None:
    """Write the value that a library has drawn while it loaded the rest."""
    write(out)


def _draw(name: str, steps: list[_Step], seed: int, out: torch.Tensor) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    for step in steps:
        step.repeat(out, generator)


@contextmanager
def _parameters_on_meta() -> Iterator[_Recipes]:
    """Let modules be built with real buffers and meta parameters; note how those are initialised.

    Under ``torch.device("meta")`` transformers would initialise nothing, buffers included.
    """
    recipes = _Recipes()
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    functions: dict[str, Any] = dict(TORCH_INIT_FUNCTIONS)
    noting = {name: recipes.noting(function) for name, function in functions.items()}
    # transformers holds on to the functions that it found when it was imported.
    tables = [vars(nn.init), TORCH_INIT_FUNCTIONS]
    with torch.random.fork_rng(devices=[]):
        nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
        for table in tables:
            table.update(noting)
        try:
            yield recipes
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
            for table in tables:
                table.update(functions)
