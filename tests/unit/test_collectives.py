"""What 1,024 ranks send in a step: as the documentation says, and close to the ZeRO paper's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.collectives import (
    PAGE,
    STRATEGIES,
    Collectives,
    Sent,
    counted,
    of_the_paper,
    table,
)

ALL_REDUCED = {"zero1": 3.0, "zero2": 5.0}
"""DeepSpeed 0.19 all-reduces what the paper reduce-scatters (stage_1_and_2.py, average_tensor)."""


def test_an_all_reduce_is_a_reduction_and_a_gathering_of_all_but_the_own_part() -> None:
    def volume(name: str) -> float:
        return Collectives(Sent(name, "float32", 4), calls=3, per_parameter=2.0).volume

    assert volume("all-gather") == volume("reduce-scatter") == 1.5
    assert volume("all-reduce") == 3.0


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("ddp", 2), ("zero1", 2), ("zero2", 3), ("zero3", 6), ("fsdp_grad_op", 4)],
)
def test_the_papers_volumes_are_those_of_two_micro_batches(strategy: str, expected: int) -> None:
    assert of_the_paper(strategy) == expected


def test_replicas_meet_with_their_shard_alone() -> None:
    assert of_the_paper("fsdp_hybrid") == 6 * 7 / 8 + 2 / 8


def test_a_row_says_what_is_called_and_what_it_comes_to() -> None:
    found = [Collectives(Sent("all-reduce", "float32", 1024), calls=4, per_parameter=1.0)]
    assert table({"ddp": found}).splitlines()[2:] == [
        "| `ddp` | 4 all-reduces over 1,024 ranks of 1.00 Ψ in float32 | 2.0 Ψ | 2.0 Ψ | 8.0 Ψ |"
    ]


def test_the_documentation_has_a_row_for_each_strategy_that_is_counted() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.endswith("Ψ |")]
    assert [row.split("`")[1] for row in rows] == list(STRATEGIES)


@pytest.mark.scale
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_sends_what_the_documentation_says(strategy: str, tmp_path: Path) -> None:
    found = counted(strategy, tmp_path)
    assert table({strategy: found}).splitlines()[-1] in PAGE.read_text()
    sent = sum(collectives.volume for collectives in found)
    assert sent == pytest.approx(ALL_REDUCED.get(strategy, of_the_paper(strategy)), rel=0.05)
