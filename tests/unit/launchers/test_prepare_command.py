"""`shardwright prepare`: what a later run finds in the cache, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from shardwright.launchers.composition.compose import compose, resolved
from shardwright.launchers.machine import facts
from shardwright.launchers.slurm import jobs
from shardwright.train.config import to_yaml
from shardwright.train.data import __main__ as data_command
from shardwright.train.errors import BAD_INPUT, UserError
from tests.e2e.cli import TINY
from tests.unit.launchers.fakes import Shardwright, make_shardwright

TEXT = "The light dove, cleaving the air in her free flight, and feeling its resistance. "


@pytest.fixture
def shardwright(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Shardwright:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return make_shardwright(tmp_path, monkeypatch, capfd)


def overrides(tmp_path: Path) -> list[str]:
    folder = tmp_path / "corpus"
    folder.mkdir(exist_ok=True)
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"{i} {TEXT}" * 20)
    return [
        *("model=gpt2_tiny", "objective=clm", *TINY, "data=text", f"data.paths=['{folder}']"),
        *("data.sequence_length=32", "data.eval_fraction=0.2", "trainer.global_batch_size=8"),
        f"data.cache_dir='{tmp_path / 'cache'}'",
    ]


def test_a_run_finds_what_was_prepared(
    shardwright: Shardwright, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = overrides(tmp_path)
    first = shardwright("prepare", *given)
    assert first.code == 0, first.err
    assert "data prepared in " in first.err
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in first.out.splitlines())
    tokens = Path(rows["tokens"].split()[0])
    assert tokens.parent == tmp_path / "cache" / "tokens"
    assert (tokens / "index.json").is_file()
    assert re.fullmatch(r"1\d documents, [\d,]+ tokens, \d+ samples", rows["training"])
    assert re.fullmatch(r"3\d\d tokens", rows["tokenizer"])
    assert {path.name for path in tmp_path.iterdir()} == {"scratch", "corpus", "cache"}
    assert not list((tmp_path / "scratch").iterdir())

    (job,) = compose(given)
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    config = resolved(job, facts.detect(os.environ), "now")
    (run_dir / "config.yaml").write_text(to_yaml(config))
    with caplog.at_level("INFO"):
        assert data_command._prepared(run_dir, config) == 0
    assert "data from cache in" in caplog.text
    assert tokens.name in (run_dir / "data.json").read_text()


def test_a_dry_run_shows_the_settings_and_makes_nothing(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    given = overrides(tmp_path)
    outcome = shardwright("prepare", "--dry-run", *given)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"# into {tmp_path / 'cache'}\n")
    shown = [line.partition(":")[0] for line in outcome.out.splitlines()[1:]]
    assert [name for name in shown if not name.startswith(" ")] == [
        "objective",
        "data",
        "tokenizer",
    ]
    assert not (tmp_path / "cache").exists()


def test_what_is_wrong_is_said_before_anything_is_made(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    for more in ([], ["--dry-run"]):
        outcome = shardwright("prepare", *overrides(tmp_path), "data.paths=[nothing.txt]", *more)
        assert outcome.code == BAD_INPUT
        assert "nothing.txt does not exist" in outcome.err
        assert not (tmp_path / "cache").exists()


# --- by SLURM -------------------------------------------------------------------------------------

SLURM = (
    "launcher=slurm",
    "launcher.array=64",
    "launcher.array_limit=8",
    "launcher.cpus_per_rank=16",
)
ON_GPUS = ("launcher.gpus_per_node=8", "launcher.nodes=4", "launcher.partition=gpu")


def test_a_job_array_makes_parts_and_a_job_behind_it_joins_them(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[list[str]] = []

    def submit(argv: list[str], cwd: Path) -> str:
        submitted.append(argv)
        return f"{len(submitted)}00"

    monkeypatch.setattr(jobs, "submit", submit)
    outcome = shardwright("prepare", *overrides(tmp_path), *SLURM, *ON_GPUS, "run_dir=some place")
    assert outcome.code == 0, outcome.err
    home = tmp_path / "some place"
    script = home / "prepare.sbatch"
    common = ["sbatch", "--parsable", f"--chdir={home}"]
    assert submitted == [
        [*common, "--array=0-63%8", "--output=logs/job-%A_%a.log", str(script)],
        [*common, "--dependency=afterany:100", str(script)],
    ]
    assert "job       200, behind 100, an array of 64\n" in outcome.out
    assert "stop      scancel 100 200\n" in outcome.out
    assert jobs.job_of(home) == "200"
    assert (home / "config.yaml").is_file()
    text = script.read_text()
    flags = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=16", "--requeue"} <= set(flags)
    assert "--partition=gpu" in flags
    assert not [flag for flag in flags if "gpus" in flag or "gres" in flag or "array" in flag]
    assert not re.search(r"@[a-z_]+@", text)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_what_slurm_refuses_leaves_nothing(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a directory nor the array, where it takes that and not the job behind it."""
    cancelled: list[str] = []

    def submit(argv: list[str], cwd: Path) -> str:
        if "--array=0-63%8" in argv:
            return "100"
        raise UserError("SLURM refused the job")

    monkeypatch.setattr(jobs, "submit", submit)
    monkeypatch.setattr(jobs, "cancel", lambda job: cancelled.append(job.id))
    outcome = shardwright("prepare", *overrides(tmp_path), *SLURM, "run_dir=place")
    assert (outcome.code, outcome.err) == (BAD_INPUT, "error: SLURM refused the job\n")
    assert cancelled == ["100"]
    assert not (tmp_path / "place").exists()


def test_a_dry_run_shows_the_script_and_the_commands(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    outcome = shardwright("prepare", "--dry-run", *overrides(tmp_path), *SLURM, "run_dir=place")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\n#!/bin/bash\n" in outcome.out
    assert " --dependency=afterany:ARRAY " in outcome.out
    assert not (tmp_path / "place").exists()
    alone = shardwright("prepare", "--dry-run", *overrides(tmp_path), "launcher=slurm")
    assert "--dependency" not in alone.out
    assert "--array" not in alone.out


def test_a_run_is_no_array(shardwright: Shardwright, tmp_path: Path) -> None:
    outcome = shardwright("train", "--dry-run", *overrides(tmp_path), *SLURM)
    assert outcome.code == BAD_INPUT
    assert "launcher.array=64 divides what `shardwright prepare` does" in outcome.err
