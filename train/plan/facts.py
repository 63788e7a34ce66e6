"""What is known of a model before it is trained, as the launcher is told it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Packed:
    """Bytes of a parameter of a quantised layer."""

    codes: int
    rows: int
    """In which FSDP divides them."""
    scales: int = 0
    """Which every rank has whole."""


@dataclass(frozen=True)
class Parameter:
    """A parameter, once where several modules share it."""

    name: str
    shape: tuple[int, ...]
    decays: bool
    """Whether its weight decays: the optimizer's first group."""
    is_hidden_matrix: bool = False
    """Whether Muon is for it."""
    trains: bool = True
    """Whether it is trained: beside an adapter, weights are not."""
    packed: Packed | None = None
    """What it takes where it is of a quantised layer."""

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def rows(self) -> int:
        """What FSDP divides among ranks: the first dimension."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class ModelFacts:
    """What a model is made of."""

    parameters: tuple[Parameter, ...]
    """In the model's order."""
    largest_layer: int
    """Most parameters that one module has of its own."""
    units: tuple[int, ...] = ()
    """Elements of each unit that FSDP gathers by itself; the rest is its root."""
    trained_units: tuple[int, ...] | None = None
    """Those elements of each that are trained; None where all are."""
    packed_units: tuple[tuple[int, int], ...] = ()
    """Of each unit the elements of quantised layers, and the bytes of their codes."""
    fp8_elements: int = 0
    """Of the matrices whose products precision=fp8 has in fp8."""
    repeated_elements: int = 0
    """Of parameters that go by two names, as a tied head does: once for each further name."""
    flops_per_token: int | None = None
    """What MFU takes a token to cost; None where it is not known."""

    @property
    def count(self) -> int:
        return sum(parameter.elements for parameter in self.parameters)

    def weights_bytes(self, of_element: int) -> int:
        """Return what the weights take where those that are not quantised have such elements."""
        return self.divided_bytes(of_element, ranks=1)

    def divided_bytes(self, of_element: int, *, ranks: int) -> int:
        """Return the same of one of the ranks among which FSDP divides rows; scales stay whole."""
        total = 0
        for each in self.parameters:
            if each.packed is None:
                total += of_element * -(-each.rows // ranks) * (each.elements // each.rows)
            else:
                codes, rows = each.packed.codes, each.packed.rows
                total += -(-rows // ranks) * (codes // rows) + each.packed.scales
        return total

    def gathered_bytes(self, of_element: int) -> tuple[list[int], int]:
        """Return what each unit takes gathered, where its scales are already, and the rest."""
        less = [of_element * elements - codes for elements, codes in self.packed_units]
        units = [of_element * e for e in self.units]
        if less:
            units = [size - spared for size, spared in zip(units, less, strict=True)]
        whole = sum(
            of_element * each.elements if each.packed is None else each.packed.codes
            for each in self.parameters
        )
        return units, whole - sum(units)

    @property
    def is_packed(self) -> bool:
        """Whether some of it is quantised."""
        return any(each.packed is not None for each in self.parameters)

    @property
    def trained(self) -> ModelFacts:
        """The same of what is trained alone: what has gradients, and state of the optimizer."""
        return replace(
            self,
            parameters=tuple(each for each in self.parameters if each.trains),
            units=self.units if self.trained_units is None else self.trained_units,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> ModelFacts:
        parameters = tuple(map(_parameter, found["parameters"]))
        found = {**found, "packed_units": tuple(map(tuple, found.get("packed_units", ())))}
        units = {name: found.get(name) for name in ("units", "trained_units")}
        as_tuples = {n: None if each is None else tuple(each) for n, each in units.items()}
        return cls(**{**found, **as_tuples, "parameters": parameters})


def _parameter(found: Mapping[str, Any]) -> Parameter:
    packed = found.get("packed")
    return Parameter(
        **{
            **found,
            "shape": tuple(found["shape"]),
            "packed": None if packed is None else Packed(**packed),
        }
    )


@dataclass(frozen=True)
class Traced:
    """Bytes that one micro-batch keeps alive besides model and gradients, and its arithmetic."""

    kept: int
    """From the forward pass for the backward pass."""
    forward: int
    """At the most in the forward pass, the loss included."""
    backward: int
    """At the most in the backward pass, where each gradient is taken away as it comes."""
    backward_growing: int
    """The same where gradients stay as they come, and counted with them."""
    flops: int
    """Of both passes, what is computed again included."""
    kept_by_blocks: int = 0
    """Of what is kept, what is there before the head begins."""
    forward_of_loss: int = 0
    """At the most while the head and the loss are computed."""
    backward_of_loss: int = 0
    """At the most in their backward pass."""

    def continued(self, deeper: Traced, steps: float) -> Traced:
        """Return what a model has that is so many steps deeper than this one; one is ``deeper``.

        Blocks repeat, so that each adds the same.
        """
        return Traced(
            **{
                each.name: round(
                    getattr(self, each.name)
                    + steps * (getattr(deeper, each.name) - getattr(self, each.name))
                )
                for each in fields(Traced)
            }
        )

    def no_less_than(self, larger: Traced, share: float) -> Traced:
        """Return the most of each that this one has, and a share of what another has."""
        return Traced(
            **{
                each.name: max(getattr(self, each.name), int(share * getattr(larger, each.name)))
                for each in fields(Traced)
            }
        )

    def as_json(self) -> dict[str, int]:
        return asdict(self)
