"""`shardwright evaluate`: what is meant, what may change, and how what was measured is shown."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.launchers import evaluating
from shardwright.launchers.commands import evaluate
from shardwright.launchers.evaluating import Target
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import SlurmLauncher, from_tree, to_yaml
from shardwright.train.errors import UserError
from shardwright.train.run_directory import evaluations
from shardwright.train.run_directory.evaluations import Evaluated
from tests.unit.launchers.ended_runs import checkpoint, contents, finished, make_ended_run, run
from tests.unit.launchers.fakes import ROOT, Shardwright, make_shardwright
from tests.unit.trees import PACKED, TREE

shardwright = pytest.fixture(make_shardwright)
run_dir = pytest.fixture(make_ended_run)


def test_a_path_means_a_run_or_its_checkpoint_or_a_model(run_dir: Path, tmp_path: Path) -> None:
    first, newest = checkpoint(run_dir, 20), run_dir / "checkpoints/checkpoint-60"
    assert evaluating.target(run_dir, None) == Target(newest, run_dir, 60)
    assert evaluating.target(run_dir, 20) == Target(first, run_dir, 20)
    assert evaluating.target(first, None) == Target(first, run_dir, 20)
    for directory in (run_dir / "final", tmp_path / "model"):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
    assert evaluating.target(run_dir, None) == Target(run_dir / "final", run_dir, 0)
    assert evaluating.target(tmp_path / "model", None) == Target(tmp_path / "model", None, 0)


def test_what_an_evaluation_does_not_read_is_said(run_dir: Path, shardwright: Shardwright) -> None:
    words = ["trainer.learning_rate=1", "tracking=wandb", "trainer.debug.numerics=watch"]
    read = ["trainer.eval_max_samples=5", "data.sequence_length=32", "strategy=ddp"]
    assert evaluating.not_read([*words, *read]) == words
    outcome = shardwright("evaluate", str(run_dir), *words[:2], "data.eval_fraction=0")
    assert outcome.code == 2
    assert (
        "warning: an evaluation makes no step and writes nothing to a tracker: "
        "trainer.learning_rate=1, tracking=wandb changes nothing of it"
    ) in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/nowhere"], "nowhere is not a directory; give a run, one of its checkpoints, or a"),
        (["{run}/logs"], "logs holds no run, no checkpoint of one and no model: there is neither"),
        (["{run}", "--step", "7"], "model.step=7: checkpoint-7 of .* is not there; it has 60"),
        (["{run}", "--step", "last"], "last is neither a step, nor latest, nor best"),
        (
            ["{run}", "model.hidden_size=48"],
            "48 was .*, and an evaluation keeps it: the weights have",
        ),
        (["{run}", "data.eval_fraction=0"], "holds out no documents .* data.eval_paths='{{NAME"),
        (["data.x=1"], "evaluate needs a run, a checkpoint or a model directory first"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    words: list[str], message: str, run_dir: Path, shardwright: Shardwright
) -> None:
    before = contents(run_dir)
    outcome = shardwright("evaluate", *(word.format(run=run_dir) for word in words))
    assert outcome.code == 2
    assert re.search(message.format(), " ".join(outcome.err.split())), outcome.err
    assert contents(run_dir) == before


def test_a_model_of_no_run_has_no_place_for_a_record(
    tmp_path: Path, shardwright: Shardwright
) -> None:
    (tmp_path / "config.json").write_text("{}")
    outcome = shardwright("evaluate", str(tmp_path), "--record")
    assert outcome.code == 2
    assert "--record appends to the evaluations.jsonl of a run, and" in outcome.err


def test_the_ranks_train_nothing_and_see_what_the_run_sees(run_dir: Path, tmp_path: Path) -> None:
    before = finished(run_dir)
    of, here = evaluating.target(run_dir, None), Machine(cores=2)
    words = ["data.eval_paths={more: /texts}", "trainer.eval_max_samples=5"]
    after, has_own_data = evaluate._config(of, words, None, here, tmp_path)
    assert has_own_data
    assert after.model.kind == "pretrained"
    assert after.model.name == str(of.weights)
    assert after.model.fused_gelu is before.model.fused_gelu  # type: ignore[union-attr]
    assert after.run_dir == str(tmp_path)
    assert (after.trainer.max_steps, after.trainer.save_every_steps) == (1, None)
    assert after.trainer.eval_max_samples == 5
    assert after.trainer.eval_samples_per_pass == before.trainer.eval_samples_per_pass
    assert after.data.eval_paths == {"more": "/texts"}
    _, has_own_data = evaluate._config(of, ["data.max_documents=9"], None, here, tmp_path)
    assert not has_own_data, "other documents are held out"


def test_ranks_of_several_nodes_are_not_all_here() -> None:
    several = {"kind": "torchrun", "nodes": 2, "nproc_per_node": 2, "head_address": "a"}
    config = run(launcher={**several, "head_port": 1}, strategy={"kind": "ddp"})
    with pytest.raises(UserError, match="4 ranks on 2 nodes, and an evaluation starts all .*slurm"):
        evaluating.config_of_run(config, Path("/w"), Path("/d"))


def job_of_run(run_dir: Path, **launcher: object) -> None:
    """Make it a run of two nodes of a cluster's."""
    section = {"kind": "slurm", "nodes": 2, "nproc_per_node": 1, "device": "cpu", **launcher}
    config = finished(run_dir).model_dump(mode="json", by_alias=True)
    config |= {"launcher": section, "strategy": {"kind": "ddp"}}
    (run_dir / "config.yaml").write_text(to_yaml(from_tree(config)))


def test_a_job_is_as_the_runs_own_was_and_never_comes_back(run_dir: Path, tmp_path: Path) -> None:
    job_of_run(run_dir, partition="gpu", dependency="afterok:7", wait=False)
    of, here = evaluating.target(run_dir, None), Machine(cores=2)
    words = ["launcher=slurm", "launcher.time_limit=5"]
    config, _ = evaluate._config(of, words, None, here, tmp_path)
    launcher = config.launcher
    assert isinstance(launcher, SlurmLauncher)
    assert (launcher.nodes, launcher.partition, launcher.time_limit) == (2, "gpu", 5)
    assert (launcher.dependency, launcher.requeue, launcher.wait) == (None, False, True)
    other, _ = evaluate._config(of, [*words, "launcher.nodes=1"], None, here, tmp_path)
    assert other.launcher.world_size == 1


def test_settings_of_a_job_do_not_go_unread_where_ranks_start_here(
    run_dir: Path, shardwright: Shardwright
) -> None:
    job_of_run(run_dir, nodes=1)
    outcome = shardwright("evaluate", str(run_dir), "launcher.partition=debug")
    assert outcome.code == 2
    assert "launcher.partition is a setting of a job, and this evaluation starts on" in outcome.err
    assert "add launcher=slurm" in " ".join(outcome.err.split())


# What a cluster's commands say, and what its job leaves; scontrol knows of one that is over.
SBATCH = """#!/bin/sh
for word in "$@"; do case $word in --chdir=*) cd "${word#--chdir=}";; esac; done
grep -q -- "--no-requeue" job.sbatch || exit 1
ls ../run/config.yaml >/dev/null || exit 1
[ -z "$MEASURES" ] || echo '{"metrics": {"eval_loss": 1.5}, "samples": 3, "sets": {}}' \
  >evaluated.json
echo 7
"""
SCONTROL = """#!/bin/sh
state=TIMEOUT
[ -z "$MEASURES" ] || state=COMPLETED
echo "JobId=7 JobState=$state Reason=None ExitCode=0:0"
"""


def cluster_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Put a cluster's commands before all others."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in commands.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


@pytest.mark.parametrize("measures", [True, False])
def test_what_a_job_has_measured_is_shown_and_its_directory_goes(
    measures: bool,
    run_dir: Path,
    tmp_path: Path,
    shardwright: Shardwright,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster_of(tmp_path, monkeypatch, sbatch=SBATCH, scontrol=SCONTROL)
    monkeypatch.setenv("MEASURES", "1" if measures else "")
    job_of_run(run_dir)
    (run_dir / "tokenizer").mkdir()
    before = {*tmp_path.iterdir()}
    outcome = shardwright("evaluate", str(run_dir), "launcher=slurm", "--json")
    left = {*tmp_path.iterdir()} - before
    if measures:
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["metrics"] == {"eval_loss": 1.5}
        assert json.loads(outcome.out)["world_size"] == 2
        assert left == set()
        return
    assert (outcome.code, outcome.out) == (1, "")
    assert "the job has ended before it had measured anything; its logs are in" in outcome.err
    assert [path.name.startswith(".run-evaluate-") for path in left] == [True]


def test_what_was_measured_is_shown_by_set(run_dir: Path) -> None:
    metrics = {"eval_loss": 1.5, "eval_perplexity": 4.48, "eval_loss/code": 2.0}
    metrics |= {"eval_bits_per_byte": 0.7, "eval_bits_per_byte/code": 0.9}
    of = evaluating.target(run_dir, None)
    entry = evaluate.facts(of, finished(run_dir), ["seed=2"], Evaluated(metrics, 12, {"code": 3}))
    assert entry["step"] == 60
    lines = [line.split() for line in evaluate.shown(entry, 80).splitlines()]
    assert lines[0] == [f"{of.weights}:", "single", "on", "1", "rank"]
    assert lines[1] == ["set", "samples", "loss", "perplexity", "bits/byte"]
    assert lines[2] == ["all", "of", "the", "corpus", "12", "1.5000", "4.4817", "0.7000"]
    assert lines[3] == ["code", "3", "2.0000", "7.3891", "0.9000"]
    evaluations.record(run_dir, entry)
    evaluations.record(run_dir, entry)
    kept = (run_dir / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == [entry, entry]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_ends_with_the_command_that_waits_for_it(
    number: signal.Signals, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = f"#!/bin/sh\nkill -{number.name[3:]} $PPID\nsleep 60\n"
    scancel = f'#!/bin/sh\necho "$@" >>{tmp_path}/cancelled\n'
    cluster_of(tmp_path, monkeypatch, sbatch=SBATCH, scontrol=told, scancel=scancel)
    monkeypatch.setenv("MEASURES", "")
    job_of_run(run_dir)
    (run_dir / "tokenizer").mkdir()
    before = {*tmp_path.iterdir()}
    # In a process of its own, which is the one that gets the signal.
    command = [sys.executable, "-m", "shardwright", "evaluate", str(run_dir), "launcher=slurm"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 130, ended.stderr
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert {*tmp_path.iterdir()} - before == {tmp_path / "cancelled"}


def test_weights_that_were_measured_packed_are_said_to_be_whole(tmp_path: Path) -> None:
    for name, tree in (("plain", TREE), ("packed", PACKED)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(to_yaml(from_tree(tree)))
    assert evaluate.beside_packed(Target(tmp_path, tmp_path / "plain", 3)) is None
    assert evaluate.beside_packed(Target(tmp_path, None, 0)) is None
    assert evaluate.beside_packed(Target(tmp_path, tmp_path / "packed", 3)) == (
        "note: these weights are whole, as final/ has them; what the run itself has logged was "
        "measured beside weights in 4 bits (model.quantization=4bit)"
    )
