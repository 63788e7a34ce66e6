"""Runs that SLURM starts: to their end, as an array, failing, refused, cancelled, looked at."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from shardwright.launchers.slurm import jobs as slurm
from shardwright.train.checkpoint.format import layout
from tests.e2e.cli import finish
from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.runs import SLURM, STEPS, shardwright, submitted

pytestmark = pytest.mark.slurm

TWO_NODES = (*SLURM, "launcher.nodes=2", "launcher.nproc_per_node=1", "launcher.cpus_per_rank=1")


def test_two_nodes_train_as_two_local_ranks_do(
    cluster: Cluster, uninterrupted: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    gpus = ("launcher.gpus_per_node=1", "launcher.device=cpu", "launcher.memory_per_node=1G")
    ended = shardwright(
        cluster,
        "train",
        *tiny,
        *TWO_NODES,
        *gpus,
        "launcher.wait=true",
        "run_dir=run",
        cwd=tmp_path,
    )
    log = runs.log(tmp_path / "run")
    assert ended.returncode == 0, ended.stderr + log

    local, distributed = (runs.metrics(path) for path in (uninterrupted, tmp_path / "run"))
    assert [line["loss"] for line in distributed] == [line["loss"] for line in local]
    assert runs.weights(tmp_path / "run") == runs.weights(uninterrupted)

    assert "[rank 0, node1/0] step 60/60" in log
    assert "start 1, on node1 node2" in log
    assert (tmp_path / "run" / "logs" / "rank-1.log").is_file()
    job = slurm.job_of(tmp_path / "run")
    assert f"job {job}: RUNNING on node[1-2]" in ended.stdout
    assert f"{tmp_path / 'run'}/logs/job-{job}.log" in ended.stdout
    record = cluster.job(str(job))
    assert (record["NumNodes"], record["NumTasks"], record["TresPerNode"]) == (
        "2",
        "2",
        "gres:gpu:1",
    )
    status = shardwright(cluster, "status", "all", cwd=tmp_path).stdout
    assert status == "no runs in runs/ and sweeps/, and none in the queue\n"
    assert "  state       done\n" in shardwright(cluster, "status", "run", cwd=tmp_path).stdout


def test_a_sweep_is_a_job_array_in_directories_of_any_name(
    cluster: Cluster, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    name = "a 'b' \"c\" $(touch pwned) `touch pwned` $HOME ; & # *\nd"
    quoted = name.replace("'", "\\'")
    ended = shardwright(
        cluster,
        *("train", "-m", "seed=3,4", *tiny, *SLURM, "launcher.nproc_per_node=1"),
        *("trainer.max_steps=3", f"sweep_dir='{quoted}'", f"objective.prompts=['{quoted}']"),
        *("launcher.wait=true", "launcher.array_limit=2"),
        cwd=tmp_path,
    )
    sweep = tmp_path / name
    assert ended.returncode == 0, ended.stderr + runs.log(sweep / "0")
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing ran"
    for number, seed in (("0", 3), ("1", 4)):
        assert f"seed: {seed}\n" in (sweep / number / "config.yaml").read_text()
        assert (sweep / number / "final" / "model.safetensors").is_file()
        assert "step 3/3" in runs.log(sweep / number)
    assert runs.weights(sweep / "0") != runs.weights(sweep / "1")
    first, second = (str(slurm.job_of(sweep / number)) for number in "01")
    assert (first[-2:], second[-2:]) == ("_0", "_1")
    table = shardwright(cluster, "status", name, cwd=tmp_path).stdout
    assert table.count("3/3") == 2


def test_a_failing_jobs_exit_code_and_error_arrive(
    cluster: Cluster, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    diverging = (
        "trainer.learning_rate=1e30",
        "trainer.max_grad_norm=0",
        "trainer.lr_scheduler=constant",
        "trainer.micro_batch_size=2",
        "launcher.nproc_per_node=2",
    )
    ended = shardwright(
        cluster,
        *("train", *tiny, *TWO_NODES, *diverging, "launcher.wait=true", "run_dir=run"),
        cwd=tmp_path,
    )
    assert ended.returncode == 1
    job = str(slurm.job_of(tmp_path / "run"))
    record = cluster.job(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "1:0", "0")
    last = runs.log(tmp_path / "run").rpartition("error: training has diverged at step ")[2]
    assert "the loss is" in last
    assert "Nothing had been saved" in last
    assert "start a new run with `shardwright train`" in last
    status = shardwright(cluster, "status", "run", cwd=tmp_path).stdout
    assert "failed: training has diverged at step" in status


def test_a_refused_submission_gives_slurms_reason_and_leaves_nothing(
    cluster: Cluster, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    ended = shardwright(
        cluster,
        *("train", *tiny, *TWO_NODES, "launcher.partition=nope", "run_dir=a/run"),
        cwd=tmp_path,
    )
    assert ended.returncode == 2
    assert "SLURM refused the job:" in ended.stderr
    assert "invalid partition specified: nope" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_cancel_stops_a_run_with_a_checkpoint_and_resume_submits_it_again(
    cluster: Cluster, uninterrupted: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "mine"
    one_node = (*SLURM, "launcher.nproc_per_node=2")
    job = submitted(cluster, *tiny, *one_node, f"run_dir={run_dir}", cwd=tmp_path)
    runs.wait_for_step(run_dir, 5)
    paused = runs.pause(run_dir)

    status = shardwright(cluster, "status", str(run_dir), cwd=tmp_path).stdout
    assert "state       running on node1" in status
    assert f"job         {job}" in status
    assert f"/{STEPS}\n" in status
    assert shardwright(cluster, "status", "all", cwd=tmp_path).stdout == status
    busy = shardwright(cluster, "resume", str(run_dir), cwd=tmp_path)
    assert busy.returncode == 2
    assert f"job {job} of {run_dir} is RUNNING" in busy.stderr
    rank_log = shardwright(cluster, "logs", str(run_dir), "--rank", "1", cwd=tmp_path)
    assert rank_log.returncode == 0

    follower = runs.start(cluster, "logs", str(run_dir), "--follow", cwd=tmp_path)
    canceller = runs.start(cluster, "cancel", str(run_dir), cwd=tmp_path)
    runs.wait_for_signal(paused, signal.SIGUSR1)
    runs.resume(paused)
    cancelled = finish(canceller)
    assert cancelled.returncode == 0, cancelled.stderr
    assert "stopped at step" in cancelled.stdout
    shown, _ = follower.communicate(timeout=60)
    assert shown.endswith(f"it was cancelled\nresume with: shardwright resume {run_dir}\n"), shown
    record = cluster.job(job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "75:0")
    stopped = json.loads((run_dir / "stopped.json").read_text())
    ((step, _),) = layout.whole_checkpoints(run_dir / "checkpoints")
    assert step == stopped["step"]
    assert 5 <= step < STEPS

    refused = shardwright(cluster, "resume", str(run_dir), "launcher.partition=nope", cwd=tmp_path)
    assert refused.returncode == 2
    assert not (run_dir / "resumes").exists(), "it would be what the next one starts from"
    again = shardwright(cluster, "resume", str(run_dir), "launcher.wait=true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr + runs.log(run_dir)
    assert f"resumes   from checkpoint-{step}" in again.stdout
    assert runs.weights(run_dir) == runs.weights(uninterrupted)
    assert shardwright(cluster, "cancel", str(run_dir), cwd=tmp_path).returncode == 2
