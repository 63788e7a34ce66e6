"""Mixture-of-experts models are trained to keep their experts equally busy, under every engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from tests.distributed.interrupted import interrupted
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

STEPS = 4
RunOf = Callable[..., Path]


@pytest.fixture
def run_of(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    tmp_path: Path,
) -> RunOf:
    """Return a function that freezes a run of a small Mixtral with this much balancing loss."""

    def freeze(strategy: str, coefficient: float, **trainer: Any) -> Path:
        directory = tmp_path / f"mixtral-{coefficient:g}"
        if not directory.exists():
            torch.manual_seed(0)
            config = MixtralConfig(
                vocab_size=384,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=4,
                num_experts_per_tok=2,
                max_position_embeddings=64,
                router_aux_loss_coef=coefficient,
            )
            MixtralForCausalLM(config).save_pretrained(directory)
        tree = tiny_tree("clm")
        tree["model"] = {"kind": "pretrained", "name": str(directory)}
        tree["tokenizer"]["vocab_size"] = 384
        tree["strategy"] = STRATEGIES[strategy]
        tree["trainer"] |= {"max_steps": STEPS, **trainer}
        return frozen_run(tree)

    return freeze


def curve(run_dir: Path, name: str) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_the_balancing_loss_counts_and_is_logged_apart(run_of: RunOf, ranks: RanksOf) -> None:
    without, with_much = run_of("ddp", 0.0), run_of("ddp", 10.0)
    for run_dir in (without, with_much):
        ranks(2)(whole_run, run_dir)
    losses = [curve(run_dir, "loss") for run_dir in (without, with_much)]
    assert losses[0][0] == losses[1][0], "the loss of the labels, of the same weights"
    assert losses[0][1] != losses[1][1], "another update"
    assert curve(without, "auxiliary_loss") == []
    balance = curve(with_much, "auxiliary_loss")
    # Equally busy experts, of which each token takes two, make it 2; it is never less.
    assert len(balance) == STEPS
    assert balance[0] > balance[-1] > 2.0
    weights = [load_file(run_dir / "final/model.safetensors") for run_dir in (without, with_much)]
    router = next(name for name in weights[0] if "gate.weight" in name)
    assert not torch.equal(weights[0][router], weights[1][router])


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp"])
def test_it_is_the_same_under_every_engine_and_recomputed(
    strategy: str, run_of: RunOf, ranks: RanksOf
) -> None:
    plain = run_of("ddp", 10.0)
    other = run_of(strategy, 10.0, checkpoint_activations_every_blocks=1)
    for run_dir in (plain, other):
        ranks(2)(whole_run, run_dir)
    for name in ("loss", "auxiliary_loss"):
        assert curve(other, name) == pytest.approx(curve(plain, name), rel=1e-4)


def test_what_was_not_logged_yet_is_carried_over_a_resume(
    run_of: RunOf, ranks: RanksOf, tmp_path: Path
) -> None:
    whole = run_of("ddp", 10.0, log_every_steps=4, save_every_steps=3)
    ranks(2)(whole_run, whole)
    resumed = interrupted(whole, tmp_path / "resumed")
    ranks(2)(whole_run, resumed)
    assert curve(resumed, "auxiliary_loss") == curve(whole, "auxiliary_loss")
