"""The files of a sweep's directory are read back as they were written, and belong to one sweep."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.launchers.sweep import directory
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.directory import Point, PointState, Sweep
from shardwright.train.errors import UserError
from tests.unit.launchers.sweep.claims import CLAIMS

POINTS = (
    Point(0, {"seed": 0, "strategy": "zero2"}, ("seed=0", "strategy=zero2")),
    Point(1, {"seed": 1, "strategy": "zero2"}, ("seed=1", "strategy=zero2")),
)


def plan(tmp_path: Path) -> Sweep:
    config = SweepConfig(name="a", grid={"seed": [0, 1]}, max_retries=3)
    return Sweep(tmp_path, "a", 12.5, config, ("model=gpt2_tiny",), POINTS)


def test_a_plan_is_read_back(tmp_path: Path) -> None:
    assert not directory.is_sweep(tmp_path)
    directory.write_plan(plan(tmp_path))
    assert directory.is_sweep(tmp_path)
    assert directory.read(tmp_path) == plan(tmp_path)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["version"] == 1
    assert written["objectives"] == [{"metric": "eval_loss", "direction": "minimize"}]
    assert written["points"][1] == {
        "number": 1,
        "settings": {"seed": 1, "strategy": "zero2"},
        "overrides": ["seed=1", "strategy=zero2"],
    }


def test_a_state_is_read_back_and_one_that_is_missing_or_damaged_waits(tmp_path: Path) -> None:
    directory.write_plan(plan(tmp_path))
    state = PointState(1, "failed", attempts=2, failures=1, code=1, why="rank 0", where="here")
    directory.write_state(tmp_path, state)
    assert directory.states(plan(tmp_path)) == [PointState(0), state]
    assert not state.is_over
    assert PointState(0, "pruned").is_over
    (tmp_path / "points" / "1.json").write_text("{")
    assert directory.state_of(tmp_path, 1) == PointState(1)


def test_a_value_that_is_no_number_of_json_is_left_out(tmp_path: Path) -> None:
    directory.write_plan(plan(tmp_path))
    state = PointState(0, "done", values={"eval_loss": math.nan, "loss": 2.5})
    directory.write_state(tmp_path, state)
    assert directory.state_of(tmp_path, 0).values == {"loss": 2.5}


def test_what_is_no_sweep_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory of a sweep: cannot read .*sweep.json"):
        directory.read(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="sweep.json is damaged, it does not parse as JSON"):
        directory.read(tmp_path)
    (tmp_path / "sweep.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="sweep.json is damaged, it lacks what a plan has: .*name"):
        directory.read(tmp_path)
    (tmp_path / "sweep.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match="was written by a later version of Shardwright"):
        directory.read(tmp_path)


def test_a_directory_belongs_to_one_live_sweep_and_to_none_that_was_killed(tmp_path: Path) -> None:
    assert not directory.is_alive(tmp_path)
    argv = [sys.executable, "-c", CLAIMS, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        assert directory.is_alive(tmp_path)
        said = f"{tmp_path} belongs to a sweep that is alive .process {other.pid} on .*Ctrl-C"
        with pytest.raises(UserError, match=said), directory.claimed(tmp_path):
            pytest.fail("not reached")
        other.kill()
        other.wait()
    with directory.claimed(tmp_path):
        pass
    assert not directory.is_alive(tmp_path)
