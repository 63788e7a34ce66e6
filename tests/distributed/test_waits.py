"""No step waits for the device, which is given work as long as there is any."""

from __future__ import annotations

import pytest

from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES
from tests.waits import waits_of_a_step

pytestmark = pytest.mark.distributed

OF_DEEPSPEED = {"zero1": 3, "zero2": 3, "zero3": 1}
"""How often deepspeed 0.19 asks whether the gradient norm is finite, to decide on the host whether
it steps (runtime/utils.py, is_invalid_grad_norm)."""


@pytest.mark.parametrize(
    ("strategy", "objective"),
    [
        *(("ddp", "mlm"), ("ddp", "clm"), ("fsdp", "mlm"), ("zero0", "clm")),
        *((strategy, "clm") for strategy in OF_DEEPSPEED),
    ],
)
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
