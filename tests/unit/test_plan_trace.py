"""A trace on tensors without values is what real ones keep alive, at any depth."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.config import RunConfig
from shardwright.train.plan import trace
from shardwright.train.plan.live import LiveBytes
from shardwright.train.plan.model import facts_of, planned
from shardwright.train.plan.trace import depths, traced
from tests.unit.launchers.composed import composed

SIZES = (
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_attention_heads=2",
    "model.vocab_size=512",
    "data.sequence_length=64",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=2",
)


def run(*overrides: str) -> RunConfig:
    _, composed_run = composed(*SIZES, *overrides)
    return resolve(composed_run, Machine(cores=2), "/runs/a")


CASES = {
    "clm": (["model=gpt2_tiny", "precision=bf16"], True),
    "mlm": (["model=roberta_tiny", "trainer.fused_loss=false"], False),
    "recomputed": (
        ["model=llama_tiny", "trainer.checkpoint_activations_every_blocks=1"],
        False,
    ),
    "documents": (["model=gpt2_tiny", "data.document_attention=true"], False),
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_without_values_keep_alive_what_real_ones_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, autocast = CASES[name]
    config = run(*overrides)
    without_values = traced(config, autocast=autocast)
    monkeypatch.setattr(trace, "FakeTensorMode", lambda **_: nullcontext())
    real = traced(config, autocast=autocast)
    for each in ("kept", "forward", "backward", "backward_growing", "flops"):
        expected = getattr(real, each)
        assert getattr(without_values, each) == pytest.approx(expected, rel=0.01), each


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=gpt2_tiny", "model.num_hidden_layers=9"],
        [
            "model=gpt2_tiny",
            "model.num_hidden_layers=9",
            "trainer.checkpoint_activations_every_blocks=2",
        ],
        [
            "model=modernbert_base",
            "objective=mlm",
            "model.num_hidden_layers=13",
            "trainer.checkpoint_activations_every_blocks=1",
        ],
    ],
)
def test_a_deep_model_goes_on_as_it_begins(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(*overrides)
    model: Any = config.model
    first, second = depths(config)
    assert second < model.num_hidden_layers
    assert (model.num_hidden_layers - first) % (second - first) == 0
    continued = traced(config, autocast=False)
    monkeypatch.setattr(trace, "depths", lambda config: [model.num_hidden_layers])
    whole = traced(config, autocast=False)
    for each in ("kept", "forward", "backward", "backward_growing", "flops"):
        assert getattr(continued, each) == pytest.approx(getattr(whole, each), rel=0.01), each


def test_a_shallow_model_is_traced_whole() -> None:
    assert depths(run("model=gpt2_tiny", "model.num_hidden_layers=3")) == [3]


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    known = torch.zeros(1000)
    with LiveBytes() as live:
        live.leave_out([known])
        first = torch.ones(10)
        view = first[2:]
        known.add_(1)
        assert live.now() == 40
        second = first * view.sum()
        del first
        assert live.now() == 80, "a view holds what it is of"
        del view, second
        assert live.now() == 0
        assert live.peak >= 80
        live.begin()
        assert live.peak == 0
        live.take_in([known[:5]])
        assert live.now() == 0, "left out"
    resized = torch.zeros(100)
    with LiveBytes() as live:
        live.take_in([resized])
        resized.untyped_storage().resize_(0)
        assert live.now() == 0


def test_attention_counts() -> None:
    """Two products forward and five backward of each head, besides those with matrices."""
    config = run(
        *("model=gpt2_tiny", "model.num_hidden_layers=2", "model.max_position_embeddings=1024"),
        *("data.sequence_length=1024", "objective=clm"),
    )
    facts = facts_of(planned(config), config)
    tokens = 2 * 1024
    of_attention = 2 * (2 + 5) * 2 * 64 * 1024 * tokens
    matrices = sum(p.elements for p in facts.parameters if p.name != "transformer.wpe.weight")
    assert traced(config, autocast=False).flops == pytest.approx(
        6 * matrices * tokens + of_attention, rel=0.01
    )
