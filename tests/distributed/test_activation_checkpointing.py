"""Recomputing activations changes the memory and nothing else, also where dropout draws masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.curves import curve
from tests.distributed.jobs import trained_with_memory_watched
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_the_asked_blocks_recompute_and_learn_the_same(
    strategy: str,
    objective: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    def train(
        every_blocks: int | None, *, offload: bool = False, parts: str = "full"
    ) -> tuple[Path, dict[str, Any]]:
        tree = tiny_tree(objective)
        tree["strategy"] = STRATEGIES[strategy]
        tree["model"] |= {"num_hidden_layers": 3, "dropout": 0.1, "attention_dropout": 0.1}
        tree["trainer"] |= {
            "max_steps": 3,
            "checkpoint_activations_every_blocks": every_blocks,
            "offload_activations": offload,
            "recompute": parts,
        }
        run_dir = frozen_run(tree)
        return run_dir, ranks(2)(trained_with_memory_watched, run_dir)[0]

    plain_dir, plain = train(None)
    all_dir, all_blocks = train(1)
    second_dir, second = train(2)
    offloaded_dir, offloaded = train(1, offload=True)
    selective_dir, selective = train(1, parts="selective")

    assert plain["calls"] == [1, 1, 1]
    assert all_blocks["calls"] == offloaded["calls"] == selective["calls"] == [2, 2, 2]
    assert second["calls"] == [2, 1, 2]
    for run_dir in (all_dir, second_dir, offloaded_dir, selective_dir):
        for key in ("loss", "grad_norm"):
            assert curve(run_dir, key) == pytest.approx(curve(plain_dir, key), abs=1e-6)
    # Blocks are alike: two of three save two thirds of what all three save.
    saved = plain["kept_bytes"] - all_blocks["kept_bytes"]
    assert saved > plain["kept_bytes"] / 2
    assert plain["kept_bytes"] - second["kept_bytes"] == pytest.approx(saved * 2 / 3, rel=1e-3)

    facts = json.loads((second_dir / "engine.json").read_text())
    assert facts["checkpoint_activations_every_blocks"] == 2
    assert facts["recomputed_blocks"] == 2
    assert facts["recompute"] == "full"
    assert json.loads((offloaded_dir / "engine.json").read_text())["offload_activations"] is True
    assert json.loads((selective_dir / "engine.json").read_text())["recompute"] == "selective"
