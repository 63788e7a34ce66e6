"""Sums over the elements of each module's weights, of which all ranks together make its norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, GRADIENTS, UPDATES = "weights", "gradients", "updates"
SQUARES = (WEIGHTS, GRADIENTS, UPDATES)
ZEROS, ELEMENTS = "zeros", "elements"
COLUMNS = (*SQUARES, ZEROS, ELEMENTS)
"""Of each module: sums of squares; how many gradients are zero, of how many."""
Part = tuple[str, int, "Tensor"]
"""As `Engine.own_weights` yields them."""


def module_of(parameter: str) -> str:
    """Return the module that has a parameter, by its name."""
    return parameter.rpartition(".")[0]


class Sums:
    """This rank's sums of one step, on the device where its weights are."""

    def __init__(self, modules: Sequence[str], device: object) -> None:
        import torch

        self._row = {module: number for number, module in enumerate(modules)}
        self.table = torch.zeros((len(modules), len(COLUMNS)), dtype=torch.float64, device=device)  # type: ignore[call-overload]

    def add(self, column: str, parts: Iterable[Part]) -> None:
        """Take in the squares of this rank's part of all weights, gradients or updates."""
        import torch

        from shardwright.train.process.doubles import device_of_sums

        for name, _, part in parts:
            row = self.table[self._row[module_of(name)]]
            values = part.detach().to(device_of_sums(part.device))
            norm = torch.linalg.vector_norm(values, dtype=torch.float64)
            row[COLUMNS.index(column)] += norm.square().to(self.table.device)
            if column == GRADIENTS:
                zeros = values.numel() - torch.count_nonzero(values)
                row[COLUMNS.index(ZEROS)] += zeros.to(self.table.device)
                row[COLUMNS.index(ELEMENTS)] += values.numel()


def metrics(
    modules: Sequence[str], table: Sequence[Sequence[float]], loss_scale: float = 1.0
) -> dict[str, float]:
    """Return what is logged of the sums of all ranks: the whole model, then each module. Pure."""
    whole = [sum(column) for column in zip(*table, strict=True)]
    found: dict[str, float] = {}
    for suffix, row in (
        ("", whole),
        *((f"/{m or '.'}", r) for m, r in zip(modules, table, strict=True)),
    ):
        sums = dict(zip(COLUMNS, row, strict=True))
        found[f"weight_norm{suffix}"] = sums[WEIGHTS] ** 0.5
        found[f"gradient_norm{suffix}"] = sums[GRADIENTS] ** 0.5 / loss_scale
        found[f"update_norm{suffix}"] = sums[UPDATES] ** 0.5
        found[f"gradient_zeros{suffix}"] = sums[ZEROS] / max(sums[ELEMENTS], 1.0)
    return found
