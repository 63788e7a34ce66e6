"""Words in Hydra's grammar as what a search may propose."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.launchers.sweep import space
from shardwright.launchers.sweep.space import Choices, Range
from shardwright.train.errors import UserError

GROUPS = {"model": ["gpt2_small", "gpt2_tiny", "bert_base"]}
KEY = "trainer.learning_rate"


def dimension(given: Any, key: str = KEY) -> space.Dimension:
    return space.dimension(key, given, GROUPS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("interval(1e-5,1e-3)", Range(1e-5, 1e-3)),
        ("interval(1,8)", Range(1.0, 8.0)),
        ("tag(log, interval(1e-5,1e-3))", Range(1e-5, 1e-3, is_log=True)),
        ("int(interval(1,8))", Range(1, 8, is_integer=True, step=1)),
        ("tag(log, int(interval(1,8)))", Range(1, 8, is_integer=True, is_log=True)),
        ("int(tag(log, interval(1,8)))", Range(1, 8, is_integer=True, is_log=True)),
        # As in a grid the end of a range() is not part of it.
        ("range(1,10,step=2)", Range(1, 9, is_integer=True, step=2)),
        ("range(1,4)", Range(1, 3, is_integer=True, step=1)),
        ("range(10,1,step=-3)", Range(4, 10, is_integer=True, step=3)),
        ("range(0.1,0.5,step=0.1)", Range(0.1, 0.4, step=0.1)),
        ("float(range(1,4))", Range(1.0, 3.0, step=1.0)),
        ("shuffle(range(1,40))", Range(1, 39, is_integer=True, step=1)),
        ("shuffle(b,a,c)", Choices(("a", "b", "c"), ("a", "b", "c"))),
        ("a,b", Choices(("a", "b"), ("a", "b"))),
        ("choice(1e-4,3e-4)", Choices((1e-4, 3e-4), ("0.0001", "0.0003"))),
        ("[1,2],[3]", Choices(("[1,2]", "[3]"), ("[1,2]", "[3]"))),
        (["a b", None, 2], Choices(("a b", None, 2), ("a b", "null", "2"))),
        (
            [[0.9, 0.95], [0.9, 0.99]],
            Choices(("[0.9,0.95]", "[0.9,0.99]"), ("[0.9,0.95]", "[0.9,0.99]")),
        ),
        ("3", Choices((3,), ("3",))),
    ],
)
def test_what_a_setting_may_be(given: Any, expected: space.Dimension) -> None:
    assert dimension(given) == expected


def test_a_glob_chooses_among_the_options_of_its_group() -> None:
    assert dimension("glob(gpt2*)", "model") == Choices(
        ("gpt2_small", "gpt2_tiny"), ("gpt2_small", "gpt2_tiny")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "interval(2,1)",
            "is not a range, as 2.0 is not below 1.0; write interval(lowest,highest)",
        ),
        ("interval(1,1)", "is not a range, as 1.0 is not below 1.0"),
        ("interval(a,b)", "is not a range (mismatch type argument start: str is not "),
        ("interval(0,inf)", "is not a range, as it has no end at inf; give a number"),
        (
            "tag(log,interval(0,1))",
            "is not a range on a logarithmic scale, which has no 0.0; begin above 0",
        ),
        ("tag(log,range(1,9))", "log is for an interval; write tag(log,interval(lowest,highest))"),
        ("tag(uniform,interval(0,1))", "the only tag that a search knows is log, not uniform"),
        ("int(range(1,10,step=0.5))", "is not a range, its step is 0; write range(first,end,step)"),
        ("range(3,1)", "has no value to run, the range is empty"),
        ("1,2,1", "has 1 twice; leave one out"),
        ("interval(1,2),interval(3,4)", "a setting has one range, and no list of them"),
    ],
)
def test_what_is_no_range_says_what_to_write(given: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        dimension(given)
    assert str(error.value).startswith(f"{KEY}={given}")
    assert message in str(error.value)


def test_values_are_written_as_the_command_line_takes_them() -> None:
    found = space.space(
        {
            KEY: "tag(log,interval(1e-5,1e-3))",
            "trainer.max_steps": "int(interval(10,20))",
            "data.name": ["a b", "c"],
            "trainer.betas": "[0.9,0.95],[0.9,0.99]",
        },
        {},
    )
    values: dict[str, space.Scalar] = {
        KEY: 1e-5,
        "trainer.max_steps": 12,
        "data.name": "c",
        "trainer.betas": "[0.9,0.99]",
    }
    assert space.overrides(found, values) == (
        f"{KEY}=1e-05",
        "trainer.max_steps=12",
        "data.name=c",
        "trainer.betas=[0.9,0.99]",
    )


def test_each_end_and_each_choice_is_checked_before_a_search() -> None:
    found = space.space({KEY: "interval(0.1,0.2)", "model": "gpt2_tiny,gpt2_small,bert_base"}, {})
    assert space.probes(found) == [
        {KEY: 0.1, "model": "gpt2_tiny"},
        {KEY: 0.2, "model": "gpt2_small"},
        {KEY: 0.1, "model": "bert_base"},
    ]
    assert space.probes({}) == []


def test_a_grid_has_as_many_points_as_its_ranges_have_steps() -> None:
    found = space.space({KEY: "range(0.1,0.5,step=0.1)", "model": "gpt2_tiny,gpt2_small"}, {})
    assert found[KEY].values() == [0.1, 0.2, 0.3, 0.4]
    assert space.combinations(found) == 8
    assert space.combinations({**found, "seed": Range(0.0, 1.0)}) is None
    assert space.combinations({"seed": Range(1, 8, is_integer=True, is_log=True)}) is None
