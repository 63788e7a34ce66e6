"""What is seen of the tensors between modules, and which module is said to have made a bad one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shardwright.train.loop.numerics.hooks import Hooks, fingerprint
from shardwright.train.loop.numerics.records import (
    SHOWN,
    Bounds,
    Finding,
    Place,
    Seen,
    earliest,
    first_bad,
    report,
)

Fault = Any
"""What a place in the model does to a tensor that passes it."""


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


def as_it_is(values: Tensor) -> Tensor:
    return values


class Attention(nn.Module):
    """Three modules share an input, and what follows them is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.between: Fault = as_it_is

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        scores = self.between(query @ key.transpose(-1, -2)).softmax(-1)
        return scores @ value, None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attention()
        self.dropout, self.inner = nn.Dropout(0.0), nn.Linear(8, 8)
        self.recomputes = False

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if self.recomputes:
            return checkpoint(self.computed, hidden, use_reentrant=False)
        return self.computed(hidden)

    def computed(self, hidden: Tensor) -> Tensor:
        attended, _ = self.attention(self.norm(hidden))
        hidden = hidden + attended
        return hidden + self.dropout(self.inner(hidden))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        mask = torch.full((1,), -torch.inf)
        for block in self.blocks:
            hidden = block(hidden, mask=mask)
        return hidden


IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def step(model: Model, hooks: Hooks | None = None) -> tuple[Tensor, list[Seen]]:
    if hooks is not None:
        hooks.begin()
    loss = model(IDS).square().sum()
    if hooks is not None:
        hooks.note_loss(loss)
    loss.backward()
    return loss, hooks.end() if hooks is not None else []


def found(model: Model, bounds: Bounds | None = None) -> Finding | None:
    hooks = Hooks(model)
    _, seen = step(model, hooks)
    return first_bad(seen, bounds or Bounds(), hooks.kinds, step=3, micro_batch=2, rank=1)


@pytest.mark.parametrize("recomputes", [False, True])
def test_nothing_that_is_computed_changes(model: Model, recomputes: bool) -> None:
    for block in model.blocks:
        block.recomputes = recomputes  # type: ignore[assignment]
    loss, _ = step(model)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    again, seen = step(model, Hooks(model))
    assert torch.equal(loss, again)
    assert all(
        torch.equal(p.grad, before)
        for p, before in zip(model.parameters(), gradients, strict=True)
        if p.grad is not None
    )
    # Each tensor once, also where a block is computed again in the backward pass.
    places = [each.place for each in seen]
    assert len(set(places)) == len(places)
    modules = {place.module for place in places}
    assert {"", "embedding", "blocks.1", "blocks.1.attention.key", "the loss"} <= modules


def test_the_host_waits_for_nothing_before_the_end(model: Model) -> None:
    read: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "local_scalar_dense" in str(function) or "nonzero" in str(function):
                read.append(str(function))
            return function(*args, **(kwargs or {}))

    hooks = Hooks(model, fingerprints=True)
    with Reads():
        hooks.begin()
        model(IDS).square().sum().backward()
    assert read == []
    assert len(hooks.end()) > 40


def test_ranges_and_bits_are_those_of_the_tensor(model: Model) -> None:
    hooks = Hooks(model, fingerprints=True)
    _, seen = step(model, hooks)
    place = Place("embedding", "Embedding", "output", "", "forward")
    (embedded,) = [each for each in seen if each.place == place]
    values = model.embedding.weight[IDS].detach()
    assert embedded.largest == values.abs().max().item()
    assert embedded.smallest == values.abs().min().item()
    assert embedded.fingerprint == values.view(torch.int32).long().sum().item()
    grad = model.embedding.weight.grad
    assert grad is not None
    (gradient,) = [
        each
        for each in seen
        if each.place.what == "gradient of weight" and each.place.module == "embedding"
    ]
    assert gradient.largest == grad.abs().max().item()


def test_one_bit_makes_another_fingerprint() -> None:
    values = torch.randn(1000).bfloat16()
    other = values.clone()
    other.view(torch.int16)[500] ^= 1
    assert fingerprint(values) != fingerprint(other)
    assert fingerprint(values) == fingerprint(values.flip(0)), "in whatever order it is added up"


# --- which module has made it ---------------------------------------------------------------------


def nan(values: Tensor) -> Tensor:
    return values * torch.nan


def after(module: nn.Module, fault: Fault) -> None:
    """Have a module give something else, out of its own code."""
    forward = module.forward
    module.forward = lambda *given, **named: fault(forward(*given, **named))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["embedding", "blocks.0.norm", "blocks.1.attention.key"])
def test_the_module_that_makes_it_is_named(
    model: Model, name: str, direction: str, recomputes: bool
) -> None:
    for block in model.blocks:
        block.recomputes = recomputes  # type: ignore[assignment]
    after(model.get_submodule(name), nan if direction == "forward" else _BadGradient.apply)
    finding = found(model)
    assert finding is not None
    assert (finding.module, finding.phase) == (name, direction)
    assert finding.problem in ("is NaN", "is infinite")
    assert finding.said().endswith(
        f", on rank 1, in micro-batch 2 of step 3: {finding.what} {finding.problem}"
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_no_module_makes_is_made_by_the_one_that_calls_them(
    model: Model, direction: str
) -> None:
    attention: Any = model.blocks[1].attention
    attention.between = nan if direction == "forward" else _BadGradient.apply
    finding = found(model)
    assert finding is not None
    assert (finding.module, finding.kind) == ("blocks.1.attention", "Attention")
    assert finding.phase == direction


def test_what_is_added_between_two_modules_is_made_by_their_caller(model: Model) -> None:
    block: Any = model.blocks[0]
    after(block, nan)
    finding = found(model)
    assert finding is not None
    assert finding.module == "blocks.0"
    assert finding.what == "its output"


def test_a_module_that_passes_its_input_on_is_not_blamed_for_its_gradient(model: Model) -> None:
    """A dropout that drops nothing gives the tensor that it was given."""
    block: Any = model.blocks[1]
    block.dropout = nn.Identity()
    after(block.dropout, as_it_is)
    computed = block.computed

    def spoilt(hidden: Tensor) -> Tensor:
        return _BadGradient.apply(computed(hidden))

    block.computed = spoilt
    finding = found(model)
    assert finding is not None
    assert finding.module == "blocks.1"


def test_a_gradient_of_a_weight_alone_is_seen(model: Model) -> None:
    linear: Any = model.blocks[0].inner
    linear.forward = lambda hidden: nn.functional.linear(
        hidden, _BadGradient.apply(linear.weight), linear.bias
    )
    finding = found(model)
    assert finding is not None
    assert finding.said().startswith("first in the backward pass of blocks.0.inner (Linear), ")
    assert finding.what == "the gradient of weight"


def test_a_loss_that_is_infinite_is_named(model: Model) -> None:
    hooks = Hooks(model)
    hooks.begin()
    hooks.note_loss(model(IDS).sum() * torch.inf)
    finding = first_bad(hooks.end(), Bounds(), hooks.kinds, step=1, micro_batch=1, rank=0)
    assert finding is not None
    assert "in the forward pass of the loss, on rank 0" in finding.said()


def test_healthy_numbers_and_masks_are_no_finding(model: Model) -> None:
    assert found(model) is None


def test_bounds_are_of_what_is_finite(model: Model) -> None:
    after(model.get_submodule("blocks.1.norm"), lambda values: values * 1e4)
    finding = found(model, Bounds(largest=1e3))
    assert finding is not None
    assert finding.module == "blocks.1.norm"
    assert "past trainer.debug.largest_magnitude=1000" in finding.problem


def test_what_has_underflowed_is_past_a_bound_too(model: Model) -> None:
    after(model.get_submodule("blocks.1.inner"), lambda values: values * 0.0)
    finding = found(model, Bounds(smallest=1e-30))
    assert finding is not None
    assert finding.module == "blocks.1.inner"
    assert finding.problem == "is at most 0, below trainer.debug.smallest_magnitude=1e-30"


# --- what is told ---------------------------------------------------------------------------------


def seen_of(count: int, bad: int) -> list[Seen]:
    places = [Place(f"m.{i}", "Linear", "output", "m", "forward") for i in range(count)]
    return [Seen(p, 0.5, math.nan if i == bad else 2.0) for i, p in enumerate(places)]


def test_the_report_ends_with_the_bad_tensor_and_shows_those_before_it() -> None:
    seen = seen_of(100, 90)
    finding = first_bad(seen, Bounds(), {}, step=3, micro_batch=2, rank=1)
    assert finding is not None
    text = report(seen, finding, scale=8.0)
    lines = text.splitlines()
    assert lines[0] == (
        "first in the forward pass of m.90 (Linear), on rank 1, in micro-batch 2 of step 3: "
        "its output is NaN"
    )
    assert "multiplied by the loss scale, 8" in text
    assert lines[-1] == "  5.00e-01         nan  forward m.90 (Linear): output"
    assert lines[-2] == "  5.00e-01    2.00e+00  forward m.89 (Linear): output"
    assert sum("forward m." in line for line in lines) == SHOWN + 1
    assert f"({90 - SHOWN} tensors before these were as they may be)" in lines


def test_the_earliest_finding_of_all_ranks_is_told() -> None:
    def finding(rank: int, micro_batch: int, place: int) -> Finding:
        return Finding(3, micro_batch, rank, "forward", "m", "M", "its output", "is NaN", place)

    later, first = finding(0, 2, 1), finding(1, 1, 7)
    assert earliest([None, later, first, finding(2, 1, 9)]) == first
    assert earliest([None]) is None
