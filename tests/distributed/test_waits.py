"""No step waits for the device, which is given work as long as there is any."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES
from tests.waits import waits_of_a_step

pytestmark = pytest.mark.distributed

OF_DEEPSPEED = {"zero1": 3, "zero2": 3, "zero3": 1}
"""How often deepspeed 0.19 asks whether the gradient norm is finite, to decide on the host whether
it steps (runtime/utils.py, is_invalid_grad_norm)."""


IN_THE_DEFAULT_SUITE = ("ddp-mlm", "fsdp-clm", "zero3-clm")


def cases() -> list[Any]:
    names = [f"{strategy}-clm" for strategy in ("ddp", "fsdp", "zero0", *OF_DEEPSPEED)]
    return [
        pytest.param(
            *name.split("-"),
            id=name,
            marks=() if name in IN_THE_DEFAULT_SUITE else pytest.mark.slow,
        )
        for name in (*names, "ddp-mlm", "fsdp-mlm")
    ]


@pytest.mark.parametrize(("strategy", "objective"), cases())
def test_no_step_waits_for_the_device(
    strategy: str, objective: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree(objective)
    tree["strategy"] = STRATEGIES[strategy]
    tree["data"]["eval_fraction"] = 0
    tree["trainer"] |= {"max_steps": 3, "log_every_steps": 100}
    for waits in ranks(2)(waits_of_a_step, frozen_run(tree)):
        own = {place: n for place, n in waits.items() if "is_invalid_grad_norm" not in place}
        assert own == {}
        assert sum(waits.values()) == OF_DEEPSPEED.get(strategy, 0)


@pytest.mark.parametrize("objective", [pytest.param("clm", marks=pytest.mark.slow), "mlm"])
def test_no_step_waits_where_documents_are_apart(
    objective: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree(objective)
    tree["data"] |= {"eval_fraction": 0, "document_attention": True}
    tree["trainer"] |= {"max_steps": 3, "log_every_steps": 100}
    assert ranks(2)(waits_of_a_step, frozen_run(tree)) == [{}, {}]
