"""Time limits, preemption, scancel and lost nodes: a run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from shardwright.launchers.ranks.processes import rank_processes
from shardwright.train.checkpoint.format import layout
from tests.e2e import cli
from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.runs import SLURM, STEPS, submitted

pytestmark = pytest.mark.slurm

RUN = (*SLURM, "launcher.nproc_per_node=2", "run_dir=run")


def test_a_job_cut_by_its_time_limit_goes_on_bit_for_bit(
    cluster: Cluster, uninterrupted: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    job = submitted(cluster, *tiny, *RUN, "launcher.grace_seconds=30", cwd=tmp_path)
    run_dir = tmp_path / "run"
    runs.wait_for_step(run_dir, 5)
    paused = runs.pause(run_dir)
    # However slow this machine is, the limit is near now. SLURM looks twice a minute.
    hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"job={job}", f"timelimit={hours * 60 + minutes + 1}")
    runs.wait_for_signal(paused, signal.SIGUSR1, seconds=90)
    cluster.run("scontrol", "update", f"job={job}", "timelimit=10")
    runs.resume(paused)
    assert_goes_on(cluster, job, run_dir, uninterrupted)
    assert "by SIGUSR1 on ranks 0, 1" in runs.log(run_dir)


@pytest.mark.parametrize("partition", ["low", "polite"])  # without and with a grace time
def test_a_job_that_is_preempted_goes_on_bit_for_bit(
    partition: str, cluster: Cluster, uninterrupted: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    job = submitted(cluster, *tiny, *RUN, f"launcher.partition={partition}", cwd=tmp_path)
    run_dir = tmp_path / "run"
    runs.wait_for_step(run_dir, 5)
    runs.pause(run_dir)
    urgent = cluster.run(
        *("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive"),
        *("--output=/dev/null", "--wrap=sleep 1"),
    ).strip()
    cluster.wait_for_state(urgent, "COMPLETED", seconds=60)
    assert_goes_on(cluster, job, run_dir, uninterrupted)
    assert "by SIGTERM" in runs.log(run_dir)


def test_scancel_leaves_a_checkpoint_from_which_the_run_goes_on_without_slurm(
    cluster: Cluster, uninterrupted: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    job = submitted(cluster, *tiny, *RUN, cwd=tmp_path)
    run_dir = tmp_path / "run"
    runs.wait_for_step(run_dir, 5)
    runs.pause(run_dir)
    # The signal before the limit, and a user who does not wait for what comes of it.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.run("scancel", job)
    record = cluster.wait_for_state(job, "CANCELLED", seconds=60)
    assert record["Restarts"] == "0"
    log = runs.log(run_dir)
    assert "SLURM ends this job" in log, log
    stopped = json.loads((run_dir / "stopped.json").read_text())
    ((step, _),) = layout.whole_checkpoints(run_dir / "checkpoints")
    assert step == stopped["step"]

    here = ("launcher=torchrun", "launcher.nproc_per_node=2", "launcher.device=cpu")
    outside = cli.shardwright("resume", "run", *here, cwd=tmp_path)
    assert outside.returncode == 2
    assert f"SLURM has no information about job {job}" in outside.stderr
    assert f"if you know that it is over, remove {run_dir}/slurm.json" in outside.stderr
    (run_dir / "slurm.json").unlink()
    ended = cli.shardwright("resume", "run", *here, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert runs.weights(run_dir) == runs.weights(uninterrupted)


def test_a_job_whose_node_dies_goes_on_from_the_last_checkpoint(
    cluster: Cluster, uninterrupted: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    job = submitted(cluster, *tiny, *RUN, "trainer.save_every_steps=4", cwd=tmp_path)
    run_dir = tmp_path / "run"
    runs.wait_for_step(run_dir, 10)
    runs.pause(run_dir)
    node = cluster.job(job)["NodeList"]
    cluster.kill_node(node)
    saved = [step for step, _ in layout.whole_checkpoints(run_dir / "checkpoints")]
    assert max(saved) < STEPS
    try:
        assert_goes_on(cluster, job, run_dir, uninterrupted)
        assert cluster.job(job)["NodeList"] != node
        assert f"resuming from checkpoint-{max(saved)}" in runs.log(run_dir)
    finally:
        cluster.start_node(node)


@pytest.mark.timeout(900)  # with the start of the cluster, and a second start of the run
def test_a_job_that_hangs_goes_on_from_the_last_checkpoint(
    cluster: Cluster, uninterrupted: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    hang = ("trainer.save_every_steps=4", "trainer.hang_timeout_seconds=30")
    job = submitted(cluster, *tiny, *RUN, *hang, cwd=tmp_path)
    run_dir = tmp_path / "run"
    runs.wait_for_step(run_dir, 10)
    os.kill(max(rank_processes(run_dir)), signal.SIGSTOP)
    assert_goes_on(cluster, job, run_dir, uninterrupted)
    log = runs.log(run_dir)
    assert "the run hung, and was ended to be resumed:" in log, log
    assert re.search(r"Rank \d on node node\d never came: ", log), log
    assert "is stopped by a signal (state T)" in " ".join(log.split())


def assert_goes_on(cluster: Cluster, job: str, run_dir: Path, uninterrupted: Path) -> None:
    record = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=180)
    log = runs.log(run_dir)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("resuming from checkpoint-") == 1
    lines = runs.metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [
        line["loss"] for line in runs.metrics(uninterrupted)
    ]
    assert runs.weights(run_dir) == runs.weights(uninterrupted)
