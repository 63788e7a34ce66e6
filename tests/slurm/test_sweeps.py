"""`shardwright sweep` as a job array on a real SLURM: preempted, failing, run again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardwright.launchers.slurm import jobs as slurm
from shardwright.launchers.sweep import directory
from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.runs import SLURM, shardwright

pytestmark = pytest.mark.slurm

SHORT = ("trainer.save_every_steps=20", "launcher.nproc_per_node=1")


def losses(sweep_dir: Path) -> list[list[tuple[int, float]]]:
    return [
        [(line["step"], line["loss"]) for line in runs.metrics(sweep_dir / str(number))]
        for number in range(len(directory.read(sweep_dir).points))
    ]


def array_of(said: str) -> str:
    (job,) = re.findall(r"^job (\d+): an array of 2 points$", said, re.MULTILINE)
    return str(job)


def test_a_sweep_whose_task_is_preempted_ends_as_one_that_was_left_alone(
    cluster: Cluster, corpus: Path, cache_dir: Path, tmp_path: Path
) -> None:
    common = (*runs.overrides(corpus, cache_dir, ranks=1), *SHORT, "strategy=single", "seed=3,4")
    alone = shardwright(cluster, "sweep", *common, *SLURM, "sweep_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    for number in range(2):
        cluster.wait_for_state(f"{array_of(alone.stdout)}_{number}", "COMPLETED", seconds=240)

    words = (*common, *SLURM, "launcher.partition=low", "sweep.max_parallel=1", "sweep_dir=array")
    submitted = shardwright(cluster, "sweep", *words, cwd=tmp_path)
    sweep_dir = tmp_path / "array"
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = array_of(submitted.stdout)
    assert "#SBATCH --array=0-1%1\n" in (sweep_dir / "job.sbatch").read_text()
    assert [slurm.job_of(sweep_dir / str(n)) for n in range(2)] == [f"{job}_{n}" for n in range(2)]

    runs.wait_for_step(sweep_dir / "0", 5)
    runs.pause(sweep_dir / "0")
    # Asked again meanwhile, it learns what runs and submits nothing.
    again = shardwright(cluster, "sweep", "array", cwd=tmp_path)
    assert "an array of" not in again.stdout, again.stdout
    assert again.returncode == 0, again.stdout + again.stderr
    urgent = cluster.run(
        *("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive"),
        *("--output=/dev/null", "--wrap=sleep 1"),
    ).strip()
    cluster.wait_for_state(urgent, "COMPLETED", seconds=60)

    for number in range(2):
        cluster.wait_for_state(f"{job}_{number}", "COMPLETED", seconds=240)
    ended = shardwright(cluster, "sweep", "array", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "array: 2 done" in ended.stdout
    assert "by SIGTERM" in runs.log(sweep_dir / "0")
    assert losses(sweep_dir) == losses(tmp_path / "alone")
    states = directory.states(directory.read(sweep_dir))
    assert [(s.state, s.attempts, s.failures) for s in states] == [("done", 1, 0)] * 2


def test_points_that_failed_are_submitted_again_alone_and_the_sweep_may_wait(
    cluster: Cluster, corpus: Path, cache_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.txt").write_text("not much")
    common = [
        word
        for word in runs.overrides(corpus, cache_dir, ranks=1)
        if not word.startswith(("data.paths=", "trainer.max_steps="))
    ]
    words = (
        *(*common, *SHORT, *SLURM, "trainer.max_steps=3", "launcher.wait=true", "sweep_dir=mixed"),
        f"data.paths=['{corpus}'],[small.txt]",
    )
    ended = shardwright(cluster, "sweep", *words, cwd=tmp_path)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "mixed: 1 done, 1 failed" in ended.stdout
    states = directory.states(directory.read(tmp_path / "mixed"))
    assert [(s.state, s.attempts) for s in states] == [("done", 1), ("failed", 1)]
    again = shardwright(cluster, "sweep", *words, cwd=tmp_path)
    assert again.returncode == 1, again.stdout + again.stderr
    assert "an array of 1 point\n" in again.stdout
    assert "#SBATCH --array=1\n" in (tmp_path / "mixed" / "job.sbatch").read_text()
    states = directory.states(directory.read(tmp_path / "mixed"))
    assert [(s.state, s.attempts) for s in states] == [("done", 1), ("failed", 2)]
