"""The children that look at models: several are asked at once, and each answer is its own."""

from __future__ import annotations

import pytest

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.plan.child import looked_at_each
from shardwright.train.config import RunConfig
from tests.unit.launchers.composed import composed


@pytest.mark.slow
def test_each_question_has_its_own_answer() -> None:
    def run(samples: int, *overrides: str) -> RunConfig:
        batch = (f"trainer.micro_batch_size={samples}", "trainer.global_batch_size=4")
        _, found = composed("model=gpt2_tiny", "data.sequence_length=64", *batch, *overrides)
        return resolve(found, Machine(cores=2), "/runs/a")

    small, large, half = looked_at_each(
        [(run(1), [False]), (run(4), [False, True]), (run(2, "precision=bf16"), [])]
    )
    assert small[0] == large[0]
    assert large[1][0].kept > 3 * small[1][0].kept
    assert large[1][0].flops == 4 * small[1][0].flops
    assert large[1][1].kept == large[1][0].kept, "in fp32 there is nothing to cast"
    assert half[1] == []
