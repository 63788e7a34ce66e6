"""`shardwright resume`: the same directory, other ranks and another engine, more steps."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e import cli

ARGUMENTS = (
    "model=gpt2_tiny",
    *cli.TINY,
    "model.max_position_embeddings=64",
    "data.max_documents=40",
    "data.eval_fraction=0.1",
    "trainer.eval_max_samples=16",
    "data.sequence_length=32",
    "strategy=zero2",
    "launcher.nproc_per_node=2",
    "trainer.max_steps=4",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.save_every_steps=2",
    "trainer.log_every_steps=1",
    "run_dir=run",
)


def test_a_run_goes_on_with_another_engine_and_more_steps(tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    first = cli.finish(cli.start("train", *ARGUMENTS, cache, cwd=tmp_path))
    assert first.returncode == 0, first.stderr
    run_dir = tmp_path / "run"
    config = (run_dir / "config.yaml").read_text()

    refused = cli.finish(cli.start("resume", "run", "model.hidden_size=64", cwd=tmp_path))
    assert refused.returncode == 2
    assert "model.hidden_size=64 was 32, and a resumed run keeps it" in refused.stderr
    assert not (run_dir / "resumes").exists()

    overrides = ("strategy=fsdp", "launcher.nproc_per_node=1", "trainer.max_steps=6")
    resumed = cli.finish(cli.start("resume", "run", *overrides, cwd=tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumes   from checkpoint-4" in resumed.stdout
    assert "fsdp on 1 rank" in resumed.stdout
    assert "step 6/6" in resumed.stdout

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["samples"] == 6 * 8
    assert (run_dir / "config.yaml").read_text() == config, "the original config stays"
    assert (run_dir / "resumes" / "1.yaml").is_file()
    (entry,) = map(json.loads, (run_dir / "history.jsonl").read_text().splitlines())
    assert entry["overrides"] == list(overrides)
    assert entry["checkpoint"] == "checkpoint-4"

    listed = cli.finish(cli.start("checkpoints", "run", "--verify", cwd=tmp_path))
    assert listed.returncode == 0
    rows = [line.split() for line in listed.stdout.splitlines() if "hashes checked" in line]
    assert [row[:3] for row in rows] == [["4", "zero2", "2"], ["6", "fsdp", "1"]]

    alone = cli.finish(cli.start("evaluate", "run", "--step", "6", "--json", cwd=tmp_path))
    assert alone.returncode == 0, alone.stderr
    measured = json.loads(alone.stdout)
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert measured["metrics"]["eval_loss"] == evaluations[6]
    assert measured["weights"] == str(run_dir / "checkpoints/checkpoint-6")

    behind = cli.finish(cli.start("resume", "run", "trainer.max_steps=3", cwd=tmp_path))
    assert behind.returncode == 2
    assert "the run is to have 3 steps and has 6 already" in behind.stderr
    assert not (run_dir / "resumes" / "2.yaml").exists()

    # Only the ranks have the tokenizer that tells how long a prompt is.
    prompts = f"objective.prompts=['{'a b ' * 99}']"
    too_long = cli.finish(cli.start("resume", "run", prompts, cwd=tmp_path))
    assert too_long.returncode == 2
    assert "this model takes at most" in too_long.stderr
    assert "nothing was trained: the run is what it was before this resume" in too_long.stderr
    assert [path.name for path in (run_dir / "resumes").glob("2*")] == []
    assert len((run_dir / "history.jsonl").read_text().splitlines()) == 1
    state = cli.finish(cli.start("status", "run", cwd=tmp_path))
    assert "state       done" in state.stdout
