"""A model that ZeRO-3 partitions has the weights that it has under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.train import data
from shardwright.train.config import load
from shardwright.train.model import build as models
from shardwright.train.model.blocks import parameter_count
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.strategy import engine_of
from shardwright.train.strategy.group import join
from shardwright.train.strategy.replicated import Replicated
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed

CAUSAL = {"gpt2", "llama"}


def compare_builds(run_dir: Path) -> dict[str, Any]:
    """Build the run's model whole, then sharded by ZeRO-3, and say how the two differ."""
    import deepspeed

    config, rank = load(run_dir), rank_from_environment()
    with join(config, rank):
        tokenizer = data.prepare(config, run_dir).tokenizer
        engine = engine_of(config)
        whole = Replicated(config, engine.layout).shard(*models.build(config, tokenizer))
        torch.manual_seed(100 + rank.index)  # what was drawn before must not matter
        sharded = engine.shard(*models.build(config, tokenizer))

        differing = []
        parameters: dict[str, Any] = dict(sharded.named_parameters())
        for name, expected in whole.named_parameters():
            with deepspeed.zero.GatheredParameters([parameters[name]]):
                if not torch.equal(parameters[name], expected):
                    differing.append(name)
        return {
            "names": list(parameters) == [name for name, _ in whole.named_parameters()],
            "differing": differing,
            "sharded": all(hasattr(p, "ds_id") for p in parameters.values()),
            "sharded_elements": sum(p.ds_tensor.numel() for p in parameters.values()),
            "elements": parameter_count(whole),
            "counted": parameter_count(sharded),
            "training": sharded.training,
            "linear": torch.nn.functional.linear.__module__,
        }


@pytest.mark.parametrize(
    ("kind", "tied"),
    [("gpt2", True), ("llama", True), ("llama", False), ("roberta", True), ("modernbert", True)],
)
def test_weights_are_the_same_bit_for_bit(
    kind: str,
    tied: bool,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm" if kind in CAUSAL else "mlm")
    tree["model"] |= {"kind": kind, "tie_word_embeddings": tied}
    if kind == "llama":
        tree["model"]["num_key_value_heads"] = 1
        del tree["model"]["dropout"]
    tree["strategy"] = {"kind": "zero", "stage": 3}
    tree["seed"] = 5

    found = ranks(2)(compare_builds, frozen_run(tree))

    for facts in found:
        assert facts["names"]
        assert facts["differing"] == []
        assert facts["sharded"]
        assert facts["counted"] == facts["elements"]
        assert facts["training"]
        # torch's own would keep every gathered weight until the backward pass.
        assert facts["linear"].startswith("deepspeed.")
    # Each rank pads its last shard of an odd tensor by at most one element.
    kept = [facts["sharded_elements"] for facts in found]
    assert kept[0] == kept[1]
    assert 0 <= sum(kept) - found[0]["elements"] < 100
