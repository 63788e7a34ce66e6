"""Points of a search: what is proposed, judged and written into their run directories."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.sweep import directory, space
from shardwright.launchers.sweep.definition import from_tree
from shardwright.launchers.sweep.directory import Point, PointState, Sweep
from shardwright.launchers.sweep.search import Growing, Search, checked_points
from shardwright.train.run_directory import pruned
from tests.unit.launchers.run_directories import a_run

RATE = "trainer.learning_rate"
SPACE = space.space({RATE: "tag(log,interval(1e-5,1e-1))"}, {})


def begun(sweep_dir: Path, **search: Any) -> Sweep:
    wanted = {"kind": "random", "trials": 3, **search}
    sweep = Sweep(sweep_dir, "a", 0.0, from_tree({"search": wanted}), ())
    directory.write_plan(sweep)
    return sweep


def search_of(sweep_dir: Path) -> Search:
    return Search(directory.read(sweep_dir), SPACE, lambda settings: False)


def planned(search: Search, sweep_dir: Path, count: int = 1) -> list[int]:
    """Take up what a search proposes as the loop of a sweep does."""
    sweep = directory.read(sweep_dir)
    numbers = []
    for each in search.propose(count):
        point = Point(len(sweep.points), each.settings, each.overrides)
        sweep = dataclasses.replace(sweep, points=(*sweep.points, point))
        numbers.append(point.number)
        a_run(sweep.run_dir(point.number))
    directory.write_plan(sweep)
    return numbers


def log(run_dir: Path, *lines: Mapping[str, Any]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def ended(number: int, state: directory.State, value: float | None = None) -> PointState:
    return PointState(number, state, values={} if value is None else {"eval_loss": value})


def test_a_proposal_that_is_in_no_plan_is_made_again(tmp_path: Path) -> None:
    begun(tmp_path)
    first = search_of(tmp_path).propose(2)
    assert [each.trial for each in first] == [0, 1]
    assert first[0].overrides != first[1].overrides
    again = search_of(tmp_path)
    assert again.propose(2) == first
    assert planned(again, tmp_path, 2) == [0, 1]
    assert not again.is_finished()
    assert [each.trial for each in again.propose(5)] == [2]
    assert planned(again, tmp_path, 5) == [2]
    assert again.is_finished()
    assert again.propose(1) == []
    assert search_of(tmp_path).is_finished()


def test_a_search_over_few_values_is_finished_when_all_are_tried(tmp_path: Path) -> None:
    begun(tmp_path)
    few = {RATE: space.Choices((0.1, 0.2), ("0.1", "0.2"))}

    def begun_again() -> Search:
        return Search(directory.read(tmp_path), few, lambda settings: settings[RATE] == 0.2)

    search = begun_again()
    assert len(search.propose(3)) == 1
    assert search.is_finished()
    assert not begun_again().is_finished()  # its point is in no plan
    assert planned(begun_again(), tmp_path, 3) == [0]
    assert begun_again().is_finished()
    assert begun_again().propose(1) == []


def test_what_lags_at_an_evaluation_is_pruned_and_its_directory_says_so(tmp_path: Path) -> None:
    begun(tmp_path, trials=9, pruner="asha", pruner_reduction_factor=2)
    search = search_of(tmp_path)
    planned(search, tmp_path, 3)
    assert search.prune(0) is None
    log(tmp_path / "0", {"step": 2, "loss": 9.0}, {"step": 2, "eval_loss": 3.0})
    log(tmp_path / "1", {"step": 2, "eval_loss": 4.0}, {"step": 4, "loss": 4.0})
    assert search.prune(0) is None
    why = "eval_loss of 4 at step 2 is not in the best 50% of those that came that far (asha)"
    assert search.prune(1) == why
    note = pruned.read(tmp_path / "1")
    assert note is not None
    assert (note.step, note.metric, note.value, note.trial) == (2, "eval_loss", 4.0, 1)
    assert str(note) == "pruned at step 2"
    # Whoever continues the sweep comes to the same, whatever the run has logged since.
    pruned.forget(tmp_path / "1")
    log(tmp_path / "1", {"step": 4, "eval_loss": 1.0})
    again = search_of(tmp_path)
    assert again.prune(1) == why
    told_again = pruned.read(tmp_path / "1")
    assert told_again is not None
    assert dataclasses.replace(told_again, time=note.time) == note
    again.tell(ended(1, "pruned"))
    assert [trial.state.name for trial in again._study.trials] == ["RUNNING", "PRUNED", "RUNNING"]
    assert again._study.trials[1].value == 4.0


def test_a_point_that_was_done_before_it_could_be_pruned_is_done(tmp_path: Path) -> None:
    begun(tmp_path, pruner="asha")
    search = search_of(tmp_path)
    planned(search, tmp_path, 2)
    log(tmp_path / "0", {"step": 2, "eval_loss": 3.0})
    log(tmp_path / "1", {"step": 2, "eval_loss": 4.0}, {"step": 4, "eval_loss": 2.0})
    assert search.prune(0) is None
    assert search.prune(1) is not None
    search.tell(ended(1, "done", 2.0))
    assert pruned.read(tmp_path / "1") is None
    assert search._study.trials[1].values == [2.0]


def test_a_point_that_failed_has_no_value(tmp_path: Path) -> None:
    begun(tmp_path)
    search = search_of(tmp_path)
    planned(search, tmp_path, 2)
    search.tell(ended(0, "failed"))
    search.tell(ended(1, "done"))  # without its objective
    assert [trial.state.name for trial in search._study.trials] == ["FAIL", "FAIL"]


def test_metrics_are_read_as_they_grow_and_anew_where_a_resume_has_written_them_anew(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    growing = Growing(path)
    assert growing.values("eval_loss") == []
    path.write_text('{"step": 1, "eval_loss": 3.0}\n{"step": 2, "lo')
    assert growing.values("eval_loss") == [(1, 3.0)]
    with path.open("a") as file:
        file.write('ss": 3.0}\nnoise\n{"step": 3, "eval_loss": null}\n')
    (step, first), (_, second) = growing.values("eval_loss")
    assert (step, first, second != second) == (1, 3.0, True)
    assert growing.values("eval_loss/a") == []
    new = tmp_path / "new"
    new.write_text('{"step": 1, "eval_loss": 2.5}\n')
    new.rename(path)
    assert growing.values("eval_loss") == [(1, 2.5)]


def test_points_to_be_checked_before_a_search_are_words_of_a_command_line() -> None:
    assert [each.overrides for each in checked_points(SPACE)] == [
        (f"{RATE}=1e-05",),
        (f"{RATE}=0.1",),
    ]


@pytest.mark.parametrize("name", ["x", "1"])
def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "pruned.json").write_text(name)
    assert pruned.read(tmp_path) is None
