"""Which steps of a run are made again, with which settings, and what is said of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.diagnosing import lineage, replay
from shardwright.launchers.diagnosing.lineage import Segment
from shardwright.train.config import from_tree, load, to_yaml
from shardwright.train.errors import UserError
from shardwright.train.loop.numerics.records import Finding
from shardwright.train.run_directory import replays
from shardwright.train.run_directory.replays import Replayed
from tests.checkpoints import write_checkpoint
from tests.unit.trees import TREE

FINDING = Finding(3, 2, 1, "forward", "h.1.mlp", "MLP", "its output", "is NaN", 40, "report.txt")


def entry(number: int, checkpoint: int | None) -> dict[str, Any]:
    name = f"checkpoint-{checkpoint}" if checkpoint else None
    return {"config": f"resumes/{number}.yaml", "checkpoint": name}


def test_what_a_resume_makes_anew_is_no_longer_what_it_was() -> None:
    restart = {"by": "torchrun", "checkpoint": "checkpoint-30"}
    history = [entry(1, 20), restart, entry(2, 40), entry(3, 20)]
    assert lineage.segments([]) == [Segment(0, "config.yaml")]
    assert lineage.segments(history[:3]) == [
        Segment(0, "config.yaml"),
        Segment(20, "resumes/1.yaml"),
        Segment(40, "resumes/2.yaml"),
    ]
    parts = lineage.segments(history)
    assert parts == [Segment(0, "config.yaml"), Segment(20, "resumes/3.yaml")]
    assert lineage.in_force(parts, 20).config == "config.yaml"
    assert lineage.in_force(parts, 21).config == "resumes/3.yaml"
    assert lineage.segments([entry(1, None)]) == [Segment(0, "resumes/1.yaml")]


@pytest.mark.parametrize(("step", "first"), [(1, 0), (10, 0), (11, 10), (25, 20), (99, 30)])
def test_a_replay_begins_behind_the_newest_checkpoint_before_it(step: int, first: int) -> None:
    parts = lineage.segments([entry(1, 20)])
    assert lineage.beginning(parts, [10, 20, 30], step) == first


def test_a_replay_over_a_resume_is_refused() -> None:
    parts = lineage.segments([entry(1, 20)])
    with pytest.raises(UserError, match=r"step 25 was made after a resume from checkpoint-20 with"):
        lineage.beginning(parts, [10], 25)
    with pytest.raises(UserError, match=r"--replay=0: a run's first step is 1"):
        lineage.beginning(parts, [10], 0)


def tree_of(**trainer: Any) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    tree["data"] |= {"eval_fraction": 0.1}
    tree["trainer"] |= trainer
    return tree


def test_its_config_is_the_runs_without_what_only_looks_at_it() -> None:
    tree = tree_of(
        save_every_steps=2,
        eval_every_steps=2,
        early_stopping_patience=1,
        early_stopping_threshold=0.1,
        compile=True,
        debug={"statistics_every_steps": 3},
    )
    tree["checkpoint"] = {"keep_every_steps": 4, "keep_best": 1, "export": "best"}
    before = from_tree(tree)
    after = replay.replayed(before, Path("/scratch"))
    assert after.run_dir == "/scratch"
    assert after.tracking.kind == "none"
    assert after.trainer.debug.numerics == "watch"
    assert (after.trainer.save_every_steps, after.trainer.eval_every_steps) == (None, None)
    assert after.trainer.compile == "auto"
    for name in ("seed", "model", "data", "objective", "strategy", "precision", "launcher"):
        assert getattr(after, name) == getattr(before, name), name
    for name in ("max_steps", "global_batch_size", "learning_rate", "log_every_steps"):
        assert getattr(after.trainer, name) == getattr(before.trainer, name), name


def test_a_run_of_a_queue_is_replayed_by_torchrun_and_one_of_several_nodes_is_not() -> None:
    tree = tree_of()
    tree["launcher"] = {"kind": "slurm", "nodes": 1, "gpus_per_node": 2}
    tree["launcher"] |= {"device": "cuda", "nproc_per_node": 2}
    launcher = replay.replayed(from_tree(tree), Path("/scratch")).launcher
    assert (launcher.kind, launcher.world_size, launcher.device) == ("torchrun", 2, "cuda")
    tree["launcher"] = {"kind": "torchrun", "nodes": 2, "nproc_per_node": 2, "head_address": "n1"}
    with pytest.raises(UserError, match=r"has 4 ranks on 2 nodes, and a replay starts all of them"):
        replay.replayed(from_tree(tree), Path("/scratch"))


def test_a_directory_is_laid_out_and_the_runs_is_left_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "tokenizer").mkdir(parents=True)
    (run_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    (run_dir / "data.json").write_text("{}")
    (run_dir / "config.yaml").write_text(to_yaml(from_tree(tree_of(save_every_steps=2))))
    for step in (2, 4):
        write_checkpoint(run_dir / "checkpoints", step, finite=True)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(UserError, match=r"checkpoint-2 was written by 1 rank\(s\), and step 4 was"):
        replay.prepare(run_dir, 4, tmp_path)
    prepared = replay.prepare(run_dir, 2, tmp_path)
    assert (prepared.first, prepared.until) == (0, 2)
    assert load(prepared.directory).trainer.debug.numerics == "watch"
    assert (prepared.directory / "tokenizer" / "tokenizer.json").is_file()
    assert replays.asked(prepared.directory) == replays.Replay(2, False)
    assert replays.last_step(prepared.directory, 10) == 2
    assert replays.last_step(run_dir, 10) == 10
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def logged(directory: Path, losses: dict[int, float]) -> None:
    directory.mkdir(exist_ok=True)
    lines = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in losses.items()]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_is_said_of_it(tmp_path: Path) -> None:
    run_dir, directory = tmp_path / "run", tmp_path / "replay"
    logged(run_dir, {1: 3.0, 3: 2.0, 4: 1.0})
    logged(directory, {3: 2.0})
    config = from_tree(tree_of())
    prepared = replay.Prepared(directory, config, 2, 3)
    assert replay.said(prepared, run_dir, Replayed(3, "it diverged"), FINDING) == [
        "Replayed steps 3 to 3 from checkpoint-2. Loss, gradient norm and rate of 1 logged "
        "step(s), up to 3, are those of the run, bit for bit.",
        "First in the forward pass of h.1.mlp (MLP), on rank 1, in micro-batch 2 of step 3: its "
        "output is NaN.",
    ]
    logged(directory, {3: 2.0000000001})
    (first, second) = replay.said(prepared, run_dir, Replayed(3, None), None)
    assert "from step 3 on loss is 2.0000000001, and was 2.0" in first
    assert second.startswith("No module gave anything that is not finite, or past a bound, up to")
    logged(directory, {})
    assert (
        "None of these steps was logged"
        in replay.said(prepared, run_dir, Replayed(3, None), None)[0]
    )
