"""Each parameter's first value, one at a time: drawn anew or read from a checkpoint.

Models are built with their parameters on the meta device, and an engine gives them their values as
it shards them. So no rank ever holds more than its shards and one whole tensor, nor reads of a
checkpoint what it does not hold.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS


class InitialValue(ABC):
    """A parameter's first value: the same on every rank, however often it is written."""

    is_drawn: bool = False
    """Whether it was not read from anywhere."""
    comes_whole: ClassVar[bool] = False
    """Whether no part of it can be had without the rest."""

    @abstractmethod
    def write(self, out: torch.Tensor, start: int = 0) -> None:
        """Fill ``out`` with the elements of the flattened value from the ``start``-th on.

        ``out`` is fp32, contiguous and on the CPU; it takes all of a value that comes whole.
        """


InitialValues = dict[str, InitialValue]
"""By each parameter's name, as `named_parameters` has it."""


@dataclass
class InMemory(InitialValue):
    """A value that lies in memory already, whole."""

    tensor: torch.Tensor
    is_drawn: bool = False

    def write(self, out: torch.Tensor, start: int = 0) -> None:
        flat = out.view(-1)
        flat.copy_(self.tensor.reshape(-1)[start : start + flat.numel()])


class Zeros(InitialValue):
    """Stands in for a value that is written later."""

    def write(self, out: torch.Tensor, start: int = 0) -> None:
        out.zero_()


# --- giving them to a model -----------------------------------------------------------------------


class Wanted(NamedTuple):
    """Some elements of a parameter that follow on one another, once it is flattened."""

    name: str
    elements: int
    """Of the whole parameter."""
    start: int
    length: int


def in_turn(wanted: Sequence[Wanted], values: InitialValues) -> Iterator[torch.Tensor]:
    """Yield each part, flat and in fp32; the next one overwrites it.

    All of them lie in one buffer. Were each allocated by itself, what the caller allocates for it
    would come to lie between them on the heap, whose gaps are then too small for the next: that was
    measured to cost half as much again as the shards.
    """

    def written(part: Wanted) -> tuple[int, int]:
        """Return start and length of what has to be written to have a part."""
        if part.length and values[part.name].comes_whole:
            return 0, part.elements
        return part.start, part.length

    largest = max((written(part)[1] for part in wanted), default=0)
    buffer = torch.empty(largest, dtype=torch.float32)
    for part in wanted:
        start, length = written(part)
        if length:  # a rank's part may be all padding
            values[part.name].write(buffer[:length], start)
        first = part.start - start
        yield buffer[first : first + part.length]


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


def emptied(model: PreTrainedModel) -> tuple[PreTrainedModel, InitialValues]:
    """Return a whole model with its parameters on the meta device, and their values."""
    values: InitialValues = {}
    owners = Owners(model)
    for name, parameter in list(model.named_parameters()):
        values[name] = InMemory(parameter.detach())
        owners.replace(parameter, parameter.detach().to("meta"))
    return model, values


# --- drawn anew ----------------------------------------------------------------------------------


def initialized(
    build: Callable[[], PreTrainedModel], seed: int
) -> tuple[PreTrainedModel, InitialValues]:
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

    def values(self, model: nn.Module, seed: int) -> InitialValues:
        """Return the initial value of each parameter that a function of `torch.nn.init` has set."""
        values: InitialValues = {}
        for name, parameter in model.named_parameters():
            steps = self._steps.get(id(parameter), [])
            if steps and math.prod(steps[0].size) == parameter.numel():
                values[name] = _Drawn(name, steps, seed)
        return values


def drawn(values: InitialValues) -> list[str]:
    """Return the names of the parameters whose first value was not read from anywhere. Pure."""
    return [name for name, value in values.items() if value.is_drawn]


@dataclass(frozen=True)
class _Drawn(InitialValue):
    """Drawn from one stream of random numbers, whose every element depends on those before it."""

    name: str
    steps: list[_Step]
    seed: int
    is_drawn: bool = True
    comes_whole: ClassVar[bool] = True

    def write(self, out: torch.Tensor, start: int = 0) -> None:
        assert start == 0, "it comes whole"
        digest = hashlib.blake2b(f"{self.seed}/{self.name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        for step in self.steps:
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
