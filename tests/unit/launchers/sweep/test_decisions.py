"""What is decided of points and said of them, without any running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.sweep import decisions
from shardwright.launchers.sweep.definition import SweepConfig, from_tree
from shardwright.launchers.sweep.directory import Point, PointState, State, Sweep


def sweep(count: int = 3, **tree: Any) -> Sweep:
    points = tuple(Point(n, {"trainer.x": n}, (f"trainer.x={n}",)) for n in range(count))
    config = from_tree(tree) if tree else SweepConfig()
    return Sweep(Path("/s"), "a", 0.0, config, ("model=gpt2_tiny",), points)


def test_cut_points_come_first_then_new_ones_then_failed_ones_up_to_the_limit() -> None:
    states = [
        PointState(0, "failed", failures=1),
        PointState(1, "done"),
        PointState(2, "waiting"),
        PointState(3, "failed", failures=2),
        PointState(4, "stopped"),
        PointState(5, "pruned"),
        PointState(6, "running"),
    ]
    assert decisions.to_start(states, 1) == [6, 4, 2, 0]
    assert decisions.to_start(states, 0) == [6, 4, 2]
    assert decisions.to_start(states, 0, retries_all=True) == [6, 4, 2, 0, 3]


@pytest.mark.parametrize(
    ("code", "is_done", "was_stopped", "is_pruned", "state"),
    [
        (0, True, False, False, "done"),
        (0, True, True, True, "done"),  # it was told too late
        (0, False, False, False, "stopped"),  # handed to a queue, or told to stop at its end
        (75, False, False, False, "stopped"),  # somebody else told it
        (75, False, False, True, "pruned"),
        (-15, False, True, False, "stopped"),  # before it could listen
        (-9, False, False, False, "failed"),
        (130, False, True, False, "stopped"),
        (1, False, True, False, "failed"),
        (1, False, False, True, "failed"),
        (2, False, False, False, "failed"),
    ],
)
def test_what_becomes_of_a_point(
    code: int, is_done: bool, was_stopped: bool, is_pruned: bool, state: State
) -> None:
    found = decisions.state_after(
        code, is_done=is_done, was_stopped=was_stopped, is_pruned=is_pruned
    )
    assert found == state


@pytest.mark.parametrize(
    ("states", "was_stopped", "code"),
    [
        (["done", "pruned"], False, 0),
        (["done", "failed"], False, 1),
        (["done", "failed", "stopped"], False, 1),
        (["done", "stopped"], False, 75),
        (["failed", "stopped", "waiting"], True, 75),
        (["done", "failed"], True, 1),
        (["done"], True, 0),
    ],
)
def test_the_exit_code(states: list[State], was_stopped: bool, code: int) -> None:
    found = [PointState(n, state) for n, state in enumerate(states)]
    assert decisions.exit_code(found, was_stopped=was_stopped) == code


def test_the_value_of_an_objective_is_the_last_that_was_logged() -> None:
    lines = [{"step": 1, "loss": 3.0}, {"eval_loss": 2.0}, {"eval_loss": 1.5, "loss": True}, {}]
    objectives = sweep(objectives=[{"metric": "loss"}, {"metric": "eval_loss"}, {"metric": "x"}])
    assert decisions.values(lines, objectives.objectives) == {"loss": 3.0, "eval_loss": 1.5}


def test_points_are_ranked_by_the_first_objective_and_its_direction() -> None:
    states = [
        PointState(0, "done", values={"eval_loss": 2.0}),
        PointState(1, "failed"),
        PointState(2, "done", values={"eval_loss": 1.0}),
    ]
    assert [p.number for p, _ in decisions.ranked(sweep(), states)] == [2, 0, 1]
    up = sweep(objectives=[{"metric": "eval_loss", "direction": "maximize"}])
    assert [p.number for p, _ in decisions.ranked(up, states)] == [0, 2, 1]
    best = decisions.best_command(sweep(), states)
    assert best is not None
    assert best.endswith("train model=gpt2_tiny trainer.x=2")
    assert decisions.best_command(sweep(), [PointState(n) for n in range(3)]) is None


def test_the_table_is_cut_to_the_terminal_and_shortens_keys_that_stay_apart() -> None:
    both = Sweep(
        Path("/s"),
        "a",
        0.0,
        SweepConfig(),
        (),
        (Point(0, {"model.size": 1, "data.size": 2, "trainer.learning_rate": 1e-4}, ()),),
    )
    rows = [(both.points[0], PointState(0))]
    head = decisions.table(both, rows, None).splitlines()[0]
    assert head.split() == [
        *("point", "state", "model.size", "data.size", "learning_rate", "eval_loss"),
    ]
    assert "0.0001" in decisions.table(both, rows, None)
    assert all(len(line) <= 30 for line in decisions.table(both, rows, 30).splitlines())
    many = sweep(40)
    shown = decisions.table(many, [(p, PointState(p.number)) for p in many.points], None)
    assert shown.splitlines()[-1] == "... and 10 more"


def test_a_reason_that_many_failed_for_is_said_once() -> None:
    states = [
        PointState(0, "failed", why="no room\nfree some"),
        PointState(1, "failed", code=3),
        PointState(2, "failed", why="no room\nfree some"),
    ]
    text = decisions.summary(sweep(), states, None)
    assert text.count("no room") == 1
    assert (
        "points 0, 2 failed for the same reason\n    no room\n    free some\n  log: /s/po" in text
    )
    assert "point 1 failed  trainer.x=1\n    exit code 3\n  log: /s/points/1.log" in text
    assert "/s: 3 failed" in text
    point = sweep().points[2]
    line = decisions.ended(point, states[2], 61.0, alike=0)
    assert line == "point 2  trainer.x=2: failed after 61 s, as point 0 did"


def test_how_to_continue() -> None:
    one = sweep(1)
    assert decisions.how_to_continue(one, [PointState(0, "done")], 1) is None
    stopped = decisions.how_to_continue(one, [PointState(0, "stopped")], 1)
    assert stopped is not None
    assert stopped.startswith("continue with: ")
    assert stopped.endswith("sweep /s")
    failed = decisions.how_to_continue(one, [PointState(0, "failed", failures=1)], 1)
    assert failed is not None
    assert failed.startswith("try what failed again with: ")
    spent = decisions.how_to_continue(one, [PointState(0, "failed", failures=2)], 1)
    assert spent is not None
    assert spent.endswith("sweep /s --retry-failed")


def test_what_makes_it_another_sweep() -> None:
    before = sweep()
    assert decisions.differences(before, before.arguments, before.points) == []
    grown = sweep(5)
    assert decisions.differences(before, before.arguments, grown.points) == []
    assert decisions.differences(grown, grown.arguments, before.points) == [
        "its points 3 (trainer.x=3); 4 (trainer.x=4) are not among those asked for"
    ]
    assert decisions.differences(before, ("model=a b",), before.points) == [
        "all its points have model=gpt2_tiny where 'model=a b' is asked for"
    ]
    other = (Point(0, {"seed": 1}, ("seed=1",)),)
    assert decisions.differences(before, before.arguments, other) == [
        "it varies trainer.x, and this one seed"
    ]
    said = decisions.another_sweep(Path("/s"), ["it varies a, and this one b"])
    assert said.startswith("sweep_dir=/s is that of another sweep: it varies a, and this one b;")
