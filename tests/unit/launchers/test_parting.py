"""Where two runs part: by what they have logged, by their checkpoints, by what modules gave."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.diagnosing import comparison, parting, replay
from shardwright.launchers.diagnosing.parting import FirstTensor
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import from_tree, to_yaml
from shardwright.train.errors import UserError
from shardwright.train.loop.numerics.records import Place, Seen, Traced
from tests.checkpoints import write_checkpoint
from tests.unit.trees import TREE


def run_of(directory: Path, losses: dict[int, float], **trainer: Any) -> Path:
    """Return a run's directory that has logged these losses."""
    directory.mkdir()
    tree = copy.deepcopy(TREE)
    tree["trainer"] |= trainer
    tree["run_dir"] = str(directory)
    (directory / "config.yaml").write_text(to_yaml(from_tree(tree)))
    lines = [
        {"step": step, "samples": 4 * step, "tokens": 0, "time": id(losses) + step, "loss": loss}
        for step, loss in losses.items()
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return directory


def told(a: Path, b: Path) -> list[str]:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        # What follows needs ranks.
        patch.setattr(comparison, "_by_modules", lambda *_: True)
        comparison.compare((a, b), Machine(), None, said.append)
    return said


def test_the_first_step_whose_figures_differ_is_told_with_the_settings(tmp_path: Path) -> None:
    a = run_of(tmp_path / "a", {1: 3.0, 2: 2.0, 4: 1.0})
    b = run_of(tmp_path / "b", {1: 3.0, 2: 2.0000000000000004, 3: 1.5, 4: 0.0}, learning_rate=0.5)
    assert told(a, b) == [
        "Of what they have logged, loss of step 2 is the first that differs: 2.0 and "
        "2.0000000000000004; 1 logged step(s) before it are the same.",
        "Settings that differ: trainer.learning_rate (0.0006 and 0.5).",
    ]


def test_what_is_logged_alike_is_the_same_whenever_it_was(tmp_path: Path) -> None:
    a = run_of(tmp_path / "a", {1: 3.0, 2: 2.0})
    b = run_of(tmp_path / "b", {1: 3.0, 2: 2.0, 3: 1.0})
    assert told(a, b) == [
        "All figures of the 2 steps that both have logged, up to 2, are the same, bit for bit."
    ]
    c = run_of(tmp_path / "c", {7: 1.0})
    with pytest.raises(UserError, match="have logged no step in common"):
        told(a, c)


def test_replays_begin_at_the_newest_checkpoint_of_the_same_bits(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, {1: 1.0}) for name in ("a", "b")]
    for run_dir in runs:
        for step in (2, 4):
            write_checkpoint(run_dir / "checkpoints", step, finite=True)
    assert parting.beginning(runs, 9) == 4
    assert parting.beginning(runs, 4) == 2
    manifest = runs[1] / "checkpoints" / "checkpoint-4" / "manifest.json"
    tree = json.loads(manifest.read_text())
    name = next(name for name in tree["files"] if name.startswith("engine/"))
    tree["files"][name]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(tree))
    assert parting.beginning(runs, 9) == 2
    (runs[0] / "history.jsonl").write_text(
        json.dumps({"config": "resumes/1.yaml", "checkpoint": "checkpoint-4"}) + "\n"
    )
    assert parting.beginning(runs, 9) == 0, "the steps behind 4 had other settings"


# --- which module ---------------------------------------------------------------------------------

PLACES = (
    Place("wte", "Embedding", "output", "", "forward"),
    Place("h.0", "Block", "input", "model", "forward"),
    Place("h.0", "Block", "output", "model", "forward"),
    Place("h.0", "Block", "gradient of its input", "model", "backward"),
)


def replayed(directory: Path, changed: dict[tuple[int, int, int], int], until: int = 3) -> Path:
    """Write what two ranks have noted of two steps; some numbers of (step, rank, tensor) differ."""
    (directory / "diagnosis").mkdir(parents=True)
    for rank in range(2):
        lines = []
        for step in range(2, until + 1):
            seen = [
                Seen(place, 0.0, float("nan"), changed.get((step, rank, number), number))
                for number, place in enumerate(PLACES)
            ]
            lines.append(json.dumps(Traced(step, 1, rank, tuple(seen)).as_tree()) + "\n")
        path = directory / "diagnosis" / f"fingerprints-rank-{rank}.jsonl"
        path.write_text("".join(lines))
    return directory


def test_the_first_tensor_of_any_rank_that_differs_is_told(tmp_path: Path) -> None:
    a = replayed(tmp_path / "a", {})
    b = replayed(tmp_path / "b", {(2, 0, 3): 77, (2, 1, 2): 77, (3, 0, 0): 77})
    found = parting.first_tensor(a, b)
    assert found == FirstTensor(2, 1, 1, 2, PLACES[2])
    assert found.said(first=1) == (
        "They part in the forward pass of h.0 (Block), on rank 1, in micro-batch 1 of step 2: the "
        "output is the first tensor that is not the same, bit for bit."
    )


def test_what_lies_between_modules_and_before_them_is_told(tmp_path: Path) -> None:
    a = replayed(tmp_path / "a", {})
    between = parting.first_tensor(a, replayed(tmp_path / "b", {(2, 0, 1): 77}))
    assert between is not None
    assert "in the forward pass of model, on rank 0" in between.said(1)
    assert "the input of h.0 is the first tensor" in between.said(1)
    data = parting.first_tensor(a, replayed(tmp_path / "c", {(2, 0, 0): 77}))
    assert data is not None
    assert data.said(1).endswith("the data differ, or the weights that they began with.")
    update = parting.first_tensor(a, replayed(tmp_path / "d", {(3, 0, 0): 77}))
    assert update is not None
    assert "the update of step 2 was another (rate, reduction, optimizer)" in update.said(1)


def test_replays_that_agree_say_that_it_does_not_repeat(tmp_path: Path) -> None:
    config = from_tree(copy.deepcopy(TREE))
    directories = [replayed(tmp_path / name, {}) for name in ("a", "b")]
    a, b = (replay.Prepared(directory, config, 1, 3) for directory in directories)
    assert comparison.by_modules(a, b).startswith(
        "Made again, they are the same up to step 3, bit for bit: what parted them does not repeat."
    )
