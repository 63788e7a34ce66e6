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


@pytest.mark.parametrize("strategy", NAMES)
def test_masters_are_the_initial_values_unrounded(
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["model"]["vocab_size"] = 385  # a bias and rows that two ranks do not divide
    tree["strategy"] = STRATEGIES[strategy]
    tree["precision"] = {"compute_dtype": "bf16"}
    tree["trainer"]["max_steps"] = 1
    assert ranks(2)(masters_that_differ, frozen_run(tree)) == [[], None]
