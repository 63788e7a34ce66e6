"""Which combinations a command line asks for, in Hydra's own syntax."""

from __future__ import annotations

import pytest

from shardwright.launchers.plan.scan import (
    MOST_PLANS,
    check_number,
    combined,
    differing,
    has_lists,
    values_of,
)
from shardwright.train.errors import UserError


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("hardware=h200x8,h200x16", ["hardware=h200x8", "hardware=h200x16"]),
        ("a.b=null,1", ["a.b=null", "a.b=1"]),
        ("a=choice(1,2)", ["a=1", "a=2"]),
        ("a=range(1,4)", ["a=1", "a=2", "a=3"]),
        ("data.paths=[a,b]", ["data.paths=[a,b]"]),
        ("hardware=mine.yaml", ["hardware=mine.yaml"]),
        ("hardware=/tmp/a/mine.yaml", ["hardware=/tmp/a/mine.yaml"]),
        ("hardware.nodes=[", ["hardware.nodes=["]),
    ],
)
def test_a_word_with_several_values(word: str, values: list[str]) -> None:
    assert values_of(word) == values
    assert has_lists(["-m", word]) == (len(values) > 1)


def test_every_combination_is_one() -> None:
    assert combined(["a=1,2", "b=3"]) == [("a=1", "b=3"), ("a=2", "b=3")]
    assert combined([]) == [()]


def test_what_differs_is_told_from_what_all_have() -> None:
    assert differing([["a=1", "b=2"], ["a=1", "b=3"]]) == [("b=2",), ("b=3",)]
    assert differing([["a=1"]]) == [()]


def test_there_is_a_most() -> None:
    check_number(["-m", f"seed=range({MOST_PLANS // 2})", "hardware=h200x8,h200x16"])
    with pytest.raises(UserError, match="102 combinations to plan, and 100 is the most"):
        check_number([f"seed=range({MOST_PLANS // 2 + 1})", "hardware=h200x8,h200x16"])
