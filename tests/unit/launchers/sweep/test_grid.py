"""Words in Hydra's grammar become points; what is no range, or fits nothing, is told."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.launchers.sweep import grid
from shardwright.launchers.sweep.definition import SweepConfig, from_tree
from shardwright.launchers.sweep.directory import Point
from shardwright.launchers.sweep.grid import Interval
from shardwright.train.errors import UserError

GROUPS = {"strategy": ["ddp", "zero1", "zero2", "zero3"], "model": ["gpt2_tiny"]}


def points(**tree: Any) -> list[Point]:
    config = from_tree(tree)
    return grid.points(config, grid.axes(config, GROUPS))


def test_a_grid_has_each_combination_the_last_axis_fastest_and_seeds_last() -> None:
    found = points(
        grid={"trainer.learning_rate": "1e-4,3e-4", "strategy": ["zero1", "zero2"]}, seeds=2
    )
    assert [point.number for point in found] == list(range(8))
    assert found[0].overrides == ("trainer.learning_rate=0.0001", "strategy=zero1", "seed=0")
    assert found[0].settings == {"trainer.learning_rate": 1e-4, "strategy": "zero1", "seed": 0}
    assert [p.settings["seed"] for p in found] == [0, 1] * 4
    assert found[3].label == "trainer.learning_rate=0.0001 strategy=zero2 seed=1"


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("range(1,4)", [1, 2, 3]),
        ("range(0,1,0.5)", [0.0, 0.5]),
        ("choice(a,b)", ["a", "b"]),
        ("sort(3,1,2)", [1, 2, 3]),
        ("tag(x,choice(1,2))", [1, 2]),
        ("[1,2],[3]", [[1, 2], [3]]),
        ("'a,b','c'", ["a,b", "c"]),
        ("7", [7]),
        ([1e-4, "1e-4", True, None, "a,b", "it's", {"a": [1, "x"]}, ""], None),
        ([0.1], [0.1]),
    ],
)
def test_values(given: Any, values: list[Any] | None) -> None:
    expected = [1e-4, 1e-4, True, None, "a,b", "it's", {"a": [1, "x"]}, ""]
    found = grid.axis("trainer.x", given, GROUPS)
    assert list(found.values) == (expected if values is None else values)


def test_a_glob_takes_the_options_of_a_group() -> None:
    assert grid.axis("strategy", "glob(zero*,exclude=zero1)", GROUPS).words == ("zero2", "zero3")
    with pytest.raises(UserError, match="glob.. chooses among the options of a group, and seed"):
        grid.axis("seed", "glob(*)", GROUPS)


def test_a_shuffled_grid_has_the_same_points() -> None:
    found = points(grid={"seed": "shuffle(range(0,20))"})
    assert sorted(p.settings["seed"] for p in found) == list(range(20))


@pytest.mark.parametrize(
    ("given", "interval"),
    [
        ("interval(1e-5,1e-3)", Interval(1e-5, 1e-3, False, False)),
        ("tag(log,interval(1e-5,1e-3))", Interval(1e-5, 1e-3, True, False)),
        ("int(interval(1,8))", Interval(1, 8, False, True)),
        ("tag(int,log,interval(1,8))", Interval(1, 8, True, True)),
    ],
)
def test_bounds_of_a_search(given: str, interval: Interval) -> None:
    found = grid.axis("trainer.x", given, GROUPS)
    assert (found.words, found.interval) == ((), interval)


def test_exclusions_leave_out_what_has_all_of_their_values() -> None:
    found = points(
        grid={"strategy": ["zero1", "zero2", "zero3"], "trainer.learning_rate": ["1e-4", 3e-4]},
        exclude=[
            {"strategy": ["zero1", "zero3"], "trainer.learning_rate": 1e-4},
            {"strategy": "zero2"},
        ],
    )
    assert [tuple(p.settings.values()) for p in found] == [("zero1", 3e-4), ("zero3", 3e-4)]
    assert [p.number for p in found] == [0, 1]


def test_the_same_combination_is_there_once() -> None:
    assert len(points(grid={"seed": "1,1,2"})) == 2


def test_a_grown_grid_keeps_its_numbers_and_adds_up_to_the_limit() -> None:
    before = points(grid={"seed": "2,1"})
    wanted = points(grid={"seed": "1,2,3,4"})
    grown = grid.joined(before, wanted, None)
    assert [(p.number, p.settings["seed"]) for p in grown] == [(0, 2), (1, 1), (2, 3), (3, 4)]
    assert [p.settings["seed"] for p in grid.joined(before, wanted, 3)] == [2, 1, 3]
    assert grid.joined(before, wanted, 1) == before
    assert [p.settings["seed"] for p in grid.joined((), wanted, 2)] == [1, 2]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "nothing varies in this sweep: give a key several values"),
        ({"grid": {"seed": []}}, "seed=[]: has no value to run"),
        ({"grid": {"seed": "range(3,1)"}}, "seed=range(3,1): has no value to run, the range is em"),
        ({"grid": {"seed": "shuffle()"}}, "seed=shuffle(): has no value to run, nothing is chosen"),
        ({"grid": {"strategy": "glob(q*)"}}, "strategy=glob(q*): has no value to run, nothing is"),
        ({"grid": {"seed": "range(1,5,0)"}}, "seed=range(1,5,0): is not a range, its step is 0"),
        ({"grid": {"seed": "range(a,b)"}}, "seed=range(a,b): is not a range (mismatch type argum"),
        ({"grid": {"seed": "range()"}}, "is not a range (missing a required argument: 'start')"),
        ({"grid": {"x": "interval(1)"}}, "x=interval(1): is not a range (missing a required argu"),
        ({"grid": {"x": "interval(3,1)"}}, "is not a range, as 3.0 is not below 1.0; write inter"),
        ({"grid": {"x": "tag(log,interval(0,1))"}}, "not a range on a logarithmic scale, which"),
        ({"grid": {"x": "choice()"}}, "x=choice(): is not a choice (empty choice is not legal)"),
        ({"grid": {"x": "interval(1,3)"}}, "x has bounds and no values, so that a search has to c"),
        ({"grid": {"x": "range(1"}}, "cannot read the override 'x=range(1'"),
        ({"grid": {"seed": "1,2"}, "seeds": 2}, "sweep.seeds=2 repeats each point, but seed is gi"),
        ({"overrides": ["seed=3"], "seeds": 2}, "sweep.seeds=2 repeats each point, but seed is gi"),
        (
            {"grid": {"x": "1,2"}, "exclude": [{"x": 3}]},
            'sweep.exclude={"x": 3}: fits no combination of this sweep, which varies x=1,2',
        ),
        (
            {"grid": {"x": "1,2"}, "exclude": [{"y": 3}]},
            'sweep.exclude={"y": 3}: y does not vary in this sweep; what does is x',
        ),
        ({"grid": {"x": "1,2"}, "exclude": [{"x": [1, 2]}]}, "leaves no combination to run"),
    ],
)
def test_what_is_wrong_is_told(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        points(**tree)
    assert message in str(error.value)


def test_the_word_of_a_value_is_read_back() -> None:
    for value in ("zero2", "a b", "it's", "a\\'b", "1,2", [1, [2, "x,y"]], {"a": "b:c"}, 1e-07):
        assert grid.value_of("x", grid.word(value)) == value


def test_the_default_config_has_no_axis() -> None:
    assert SweepConfig().grid == {}
