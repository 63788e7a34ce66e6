"""The terminal says once, on rank 0 and in the same words for every engine, which dtypes run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

BF16 = {"compute_dtype": "bf16"}
PURE = {**BF16, "reduce_dtype": "bf16", "master_dtype": "bf16", "moments_dtype": "bf16"}


@pytest.mark.parametrize(
    ("strategy", "precision", "line"),
    [
        *(
            (
                strategy,
                BF16,
                f"{strategy} on 2 ranks: bf16 compute, fp32 reduction, fp32 master weights, "
                "fp32 moments",
            )
            for strategy in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp")
        ),
        *(
            (
                strategy,
                {},
                f"{strategy} on 2 ranks: fp32 compute, fp32 reduction, fp32 master weights, "
                "fp32 moments",
            )
            for strategy in ("ddp", "zero0", "zero3")
        ),
        *(
            (
                strategy,
                PURE,
                f"{strategy} on 2 ranks: bf16 compute, bf16 reduction, bf16 master weights, "
                "bf16 moments",
            )
            for strategy in ("zero2", "fsdp")
        ),
    ],
)
def test_the_precision_that_runs_is_printed(
    strategy: str,
    precision: dict[str, Any],
    line: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"], tree["precision"] = STRATEGIES[strategy], precision
    tree["trainer"]["max_steps"] = 1
    run_dir = frozen_run(tree)

    first, second = ranks(2)(whole_run, run_dir)

    assert first.splitlines().count(line) == 1, first
    assert second == ""
    facts = json.loads((run_dir / "engine.json").read_text())
    assert f"{facts['precision']['compute']} compute" in line


def test_one_rank_alone_reduces_nothing(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"], tree["precision"] = {"kind": "single"}, BF16
    tree["trainer"]["max_steps"] = 1
    tree["launcher"]["nproc_per_node"] = 1
    (console,) = ranks(1)(whole_run, frozen_run(tree))
    assert "single on 1 rank: bf16 compute, fp32 master weights, fp32 moments\n" in console
