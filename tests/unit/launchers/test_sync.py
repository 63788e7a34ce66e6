"""`shardwright sync` hands on what a tracker lacks, of a run that has one and has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.train.run_directory import owner
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)


@pytest.fixture
def run_dir(tmp_path: Path, tiny_tree: Any) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    write(made, tiny_tree("clm") | {"tracking": {"kind": "tensorboard"}})
    (made / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "time": 1.0}) + "\n")
    return made


def write(run_dir: Path, tree: dict[str, Any]) -> None:
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))


def test_what_a_tracker_lacks_is_handed_on(shardwright: Shardwright, run_dir: Path) -> None:
    outcome = shardwright("sync", "run")
    where = f"tensorboard --logdir {run_dir / 'tensorboard'}\n"
    assert (outcome.code, outcome.out, outcome.err) == (0, where, "")
    assert list((run_dir / "tensorboard").iterdir())


def test_a_part_that_is_lacking_still_is_told(shardwright: Shardwright, run_dir: Path) -> None:
    (run_dir / "tensorboard").write_text("a file where its directory would be")
    outcome = shardwright("sync", "run")
    assert outcome.code == 1
    assert "warning: TensorBoard lacks a part of this run (" in outcome.out
    assert "Traceback" not in outcome.out


def test_a_run_without_a_tracker_or_alive_is_refused(
    shardwright: Shardwright, run_dir: Path, tiny_tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = owner.Owner("node1", 7, 0.0, None)
    monkeypatch.setattr(owner, "look", lambda run_dir: (theirs, True))
    outcome = shardwright("sync", "run")
    assert outcome.code == 2
    assert "belongs to process 7 on node1" in outcome.err
    assert "wait until it has ended" in outcome.err
    write(run_dir, tiny_tree("clm") | {"tracking": {"kind": "none"}})
    outcome = shardwright("sync", "run")
    assert (outcome.code, outcome.out) == (2, "")
    assert "has no tracker (tracking=none)" in outcome.err
