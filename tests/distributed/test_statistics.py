"""trainer.debug.statistics_every_steps: the same norms of each module, however it is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwright.train.loop.trainer import Trainer
from tests.distributed.curves import lines
from tests.distributed.jobs import trained
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

NORMS = ("weight_norm", "gradient_norm", "update_norm")
MODULE = "transformer.h.1.mlp.c_fc"
Runs = dict[str, Path]


def tree_of(tree: dict[str, Any], engine: str) -> dict[str, Any]:
    # Odd sizes, so that partitions have padding and parts begin within a tensor.
    tree["model"] |= {"vocab_size": 389, "intermediate_size": 67}
    tree["strategy"] = STRATEGIES[engine]
    tree["data"]["eval_fraction"] = 0.0
    # Clipped: what is measured is the gradient before that.
    tree["trainer"] |= {"max_steps": 4, "max_grad_norm": 0.05}
    tree["trainer"] |= {"debug": {"statistics_every_steps": 2}}
    tree["launcher"]["nproc_per_node"] = 1 if engine == "single" else 2
    return tree


def measured_by_hand(trainer: Trainer) -> dict[str, float]:
    """Return the norms of what one rank alone holds whole."""
    return {name: float(p.detach().norm()) for name, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Return what the run on one rank has logged, which the others are compared with."""
    return {}


@pytest.mark.parametrize("engine", ["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"])
def test_every_engine_measures_what_one_rank_alone_does(
    engine: str, alone: dict[str, Any], tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    if not alone:
        run_dir = frozen_run(tree_of(tiny_tree("clm"), "single"))
        (norms,) = ranks(1)(trained, run_dir, measured_by_hand)
        alone.update(lines=lines(run_dir))
        last = [line for line in lines(run_dir) if "weight_norm" in line][-1]
        parts = [norms[f"{MODULE}.{part}"] for part in ("weight", "bias")]
        by_hand = sum(part**2 for part in parts) ** 0.5
        assert last[f"weight_norm/{MODULE}"] == pytest.approx(by_hand, rel=1e-6)
    run_dir = frozen_run(tree_of(tiny_tree("clm"), engine))
    ranks(2)(trained, run_dir, measured_by_hand)
    expected, found = (
        {line["step"]: line for line in of_run if "weight_norm" in line}
        for of_run in (alone["lines"], lines(run_dir))
    )
    assert list(found) == list(expected) == [1, 2, 4]
    for step, line in found.items():
        assert line.keys() == expected[step].keys()
        for name, value in line.items():
            if name.startswith(NORMS):
                assert value == pytest.approx(expected[step][name], rel=2e-4, abs=1e-7), name
            elif name.startswith("gradient_zeros"):
                # The gradients of keys' biases are 0 but for how they are rounded.
                assert value == pytest.approx(expected[step][name], abs=1.1e-2), name
        # Of 66 positions a sample has 32.
        assert line["gradient_zeros/transformer.wpe"] == pytest.approx(34 / 66)
        logged = next(each for each in lines(run_dir) if each["step"] == step and "loss" in each)
        assert line["gradient_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)
        assert line["gradient_norm"] > 0.05, "it was clipped, and is to be measured before that"
