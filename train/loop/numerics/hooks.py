"""Hooks around every module that note what goes in and comes out, forward and backward.

What is noted of a tensor is a few numbers on its device, which the host reads once a micro-batch.
The values that a model computes stay the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.train.loop.numerics.records import (
    BACKWARD,
    FORWARD,
    INPUT,
    INPUT_GRADIENT,
    LOSS,
    OUTPUT,
    OUTPUT_GRADIENT,
    Place,
    Seen,
)
from shardwright.train.process.doubles import doubled

DEEPEST = 4
"""Levels of tuples and mappings within an output in which tensors are looked for."""


class Hooks:
    """The hooks of one model, which note nothing until they are told to."""

    def __init__(self, model: nn.Module, *, fingerprints: bool = False) -> None:
        """``fingerprints`` has all bits of each tensor counted together, too."""
        self.kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        self._takes_fingerprints = fingerprints
        self._is_on = False
        self._callers: list[str] = []
        """The modules that are being computed, the innermost last."""
        self._places: list[Place] = []
        self._magnitudes: list[Tensor] = []
        self._fingerprints: list[Tensor] = []
        self._weights: dict[int, nn.Parameter] = {}
        """Those that have a hook, by identity."""
        for name, module in model.named_modules():
            # After those of the engine, which have gathered the weights by then.
            module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            module.register_forward_hook(self._behind(name), with_kwargs=True, always_call=True)

    # --- a micro-batch ------------------------------------------------------------------------

    def begin(self) -> None:
        """Note what comes from here on, and forget what came before."""
        self._callers.clear()
        self._places.clear()
        self._magnitudes.clear()
        self._fingerprints.clear()
        self._is_on = True

    def note_loss(self, loss: Tensor) -> None:
        """Take in a micro-batch's loss, and the gradient with which the backward pass begins."""
        self._note(loss, Place(LOSS, "", OUTPUT, "", FORWARD))

    def end(self) -> list[Seen]:
        """Return what was seen, in order. The host waits here for the device, once."""
        self._is_on = False
        if not self._places:
            return []
        magnitudes = torch.stack(self._magnitudes).tolist()
        fingerprints: list[int | None] = [None] * len(self._places)
        if self._takes_fingerprints:
            fingerprints = torch.stack(self._fingerprints).tolist()
        pairs = zip(magnitudes[::2], magnitudes[1::2], strict=True)
        return [
            Seen(place, *pair, fingerprint)
            for place, pair, fingerprint in zip(self._places, pairs, fingerprints, strict=True)
        ]

    def _note(self, tensor: Tensor, place: Place) -> None:
        values = tensor.detach()
        values = values.to_local() if hasattr(values, "to_local") else values
        if not values.numel():
            return
        with torch.no_grad():
            if values.element_size() == 1:  # fp8, of which torch takes no maximum
                values = values.float()
            # Both are NaN where any element is. On a CPU norms take twice as long.
            self._magnitudes.extend(doubled(found) for found in values.abs().aminmax())
            if self._takes_fingerprints:
                self._fingerprints.append(fingerprint(values))
        self._places.append(place)

    # --- the hooks ----------------------------------------------------------------------------

    def _before(self, name: str) -> Any:
        def before(module: nn.Module, arguments: Any, options: Any) -> Any:
            if not self._is_on:
                return None
            caller = self._callers[-1] if self._callers else ""
            self._callers.append(name)
            self._watch_weights(name, module)
            return self._with_inputs_noted(name, caller, arguments, options)

        return before

    def _with_inputs_noted(
        self, name: str, caller: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Return a call's arguments, whose gradients are noted as those of this call alone.

        A tensor that several modules take has the sum of their gradients: so each gets a view.
        """
        number = 0

        def seen(value: Any) -> Any:
            nonlocal number
            if not (isinstance(value, Tensor) and value.requires_grad):
                return value
            self._forward(value, Place(name, self.kinds[name], INPUT, caller, FORWARD, number))
            place = Place(name, self.kinds[name], INPUT_GRADIENT, caller, BACKWARD, number)
            number += 1
            view = value.view_as(value)
            view.register_hook(self._noting(place))
            return view

        noted = tuple(seen(value) for value in arguments)
        return noted, {key: seen(value) for key, value in options.items()}

    def _behind(self, name: str) -> Any:
        def behind(module: nn.Module, arguments: Any, options: Any, output: Any) -> Any:
            if not self._is_on or not self._callers:
                return None
            if self._callers[-1] != name:  # it was called before these were on, or has raised
                return None
            self._callers.pop()
            caller = self._callers[-1] if self._callers else ""
            kind = self.kinds[name]
            # As a dropout that drops nothing does. Its hook would come behind that of the input.
            given = (*arguments, *options.values())
            if isinstance(output, Tensor) and any(output is each for each in given):
                output = output.view_as(output)
            for number, tensor in enumerate(_tensors(output)):
                self._forward(tensor, Place(name, kind, OUTPUT, caller, FORWARD, number))
                if tensor.requires_grad:
                    place = Place(name, kind, OUTPUT_GRADIENT, caller, BACKWARD, number)
                    tensor.register_hook(self._noting(place))
            return output

        return behind

    def _forward(self, tensor: Tensor, place: Place) -> None:
        # In the backward pass blocks are computed again whose activations were not kept.
        if torch._C._current_graph_task_id() == -1:
            self._note(tensor, place)

    def _noting(self, place: Place) -> Any:
        def note(gradient: Tensor) -> None:
            if self._is_on:
                self._note(gradient, place)

        return note

    def _watch_weights(self, name: str, module: nn.Module) -> None:
        """Note the gradients of a module's own weights, as they are before ranks add them up."""
        for own, weight in module._parameters.items():
            # FSDP puts whole ones in place of its shards, the same objects each time.
            if weight is None or not weight.requires_grad or id(weight) in self._weights:
                continue
            self._weights[id(weight)] = weight
            what = f"gradient of {own}"
            weight.register_hook(self._noting(Place(name, self.kinds[name], what, name, BACKWARD)))


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield the floating-point tensors in what a module has returned."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif depth < DEEPEST:
        if isinstance(value, dict):
            value = value.values()
        elif not isinstance(value, list | tuple):
            return
        for part in value:
            yield from _tensors(part, depth + 1)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(values: Tensor) -> Tensor:
    """Return the bits of all elements added up, which no order of addition changes."""
    bits = values.contiguous().view(_BITS[values.element_size()])
    return bits.sum(dtype=torch.int64)
