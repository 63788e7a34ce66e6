"""Blocks are compiled for one size again once the batch has stopped growing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwright.train.config import TrainerConfig
from shardwright.train.loop.callbacks.full_batch import FullBatch, is_compiled

GROWS = {"global_batch_size": 8, "batch_warmup_from": 4, "batch_warmup_samples": 10}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


def steps(model: torch.nn.Module, sizes: list[int], **trainer: Any) -> None:
    """Pass batches of these sizes through a model, as steps that consume as many samples."""
    config = TrainerConfig.model_validate({"max_steps": 9, **trainer})
    live: Any = SimpleNamespace(config=SimpleNamespace(trainer=config), model=model, samples_seen=0)
    callback = FullBatch(live)
    for size in sizes:
        callback.on_step_begin(None, None, None)
        model(torch.ones(size, 3))
        live.samples_seen += size


class Block(torch.nn.Module):
    """One of our own: torch does not trace a frame of its own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.weight


def compiled() -> tuple[torch.nn.Module, list[bool]]:
    """Return a compiled model, and for each graph of it whether it is of any size."""
    any_size = []

    def note(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        any_size.append(any(isinstance(given, torch.SymInt) for given in inputs))
        forward: Callable[..., Any] = graph.forward
        return forward

    model = Block()
    model.compile(backend=note)
    return model, any_size


def test_the_full_batch_has_a_graph_of_its_own() -> None:
    model, any_size = compiled()
    steps(model, [4, 5, 6, 8, 8, 8], **GROWS)
    # The first size, any, and once the 10 samples are consumed the one that stays.
    assert any_size == [False, True, False]


def test_a_constant_batch_is_compiled_once() -> None:
    model, any_size = compiled()
    steps(model, [8, 8, 8], global_batch_size=8)
    assert any_size == [False]


def test_what_is_not_compiled_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 3)
    assert not is_compiled(model)
    monkeypatch.setattr(torch.compiler, "reset", lambda: pytest.fail("nothing was compiled"))
    steps(model, [4, 5, 6, 8], **GROWS)
