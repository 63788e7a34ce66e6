"""Masters start from the initial values themselves, what is computed with from these rounded."""

from __future__ import annotations

import pytest

from tests.distributed.master_weights import masters_that_differ
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

NAMES = (
    *("ddp", "fsdp", "zero0", "zero1", "zero2", "zero2_round_robin", "zero2_offload"),
    *("zero3", "zero3_hierarchical", "zero3_offload"),
)


@pytest.mark.parametrize(
    ("strategy", "world_size"), [*((name, 2) for name in NAMES), ("fsdp_hybrid", 4)]
)
def test_masters_are_the_initial_values_unrounded(
    strategy: str,
    world_size: int,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["model"]["vocab_size"] = 385  # a bias and rows that two ranks do not divide
    tree["strategy"] = STRATEGIES[strategy]
    tree["precision"] = {"compute_dtype": "bf16"}
    tree["trainer"]["max_steps"] = 1
    tree["launcher"]["nproc_per_node"] = world_size
    tree["trainer"]["micro_batch_size"] = 4
    found = ranks(world_size)(masters_that_differ, frozen_run(tree))
    assert found == [[], *[None] * (world_size - 1)]
