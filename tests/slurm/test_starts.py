"""Ranks below a launcher of each node's own, and ranks that the doctor asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.distributed.curves import lines
from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.runs import STEPS, shardwright, submitted

pytestmark = pytest.mark.slurm

TWO_NODES = ("launcher=slurm", "launcher.nodes=2", "launcher.time_limit=10")


@pytest.mark.parametrize("starts", ["torchrun", "deepspeed"])
def test_a_signal_reaches_ranks_below_a_launcher_and_the_job_goes_on(
    starts: str, cluster: Cluster, uninterrupted: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    settings = (f"launcher.starts={starts}", "launcher.nproc_per_node=1", "run_dir='a $b'")
    job = submitted(cluster, *tiny, *TWO_NODES, *settings, cwd=tmp_path)
    run_dir = tmp_path / "a $b"
    runs.wait_for_step(run_dir, 5)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for_state(job, "COMPLETED", seconds=240)
    log = runs.log(run_dir)
    assert "start 2, on node1 node2" in log
    assert "stopped at step" in log
    assert [line["step"] for line in runs.metrics(run_dir)] == list(range(1, STEPS + 1))
    assert runs.weights(run_dir) == runs.weights(uninterrupted)


def test_the_deepspeed_command_has_srun_start_its_ranks_in_an_allocation(
    cluster: Cluster, uninterrupted: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    cwd = tmp_path / 'a, "b" $(touch ran)'
    cwd.mkdir()
    hosts = tmp_path / "hosts"
    run = ("train", *tiny, "launcher=deepspeed", "launcher.backend=slurm", "run_dir=run")
    cores = "launcher.backend_arguments='--cpus-per-task=2'"
    over_hosts = (*run, f"launcher.hostfile={hosts}", cores)
    allocation = ("salloc", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")

    hosts.write_text("node2 slots=1\nnode1 slots=1\n")
    outside = shardwright(cluster, *over_hosts, cwd=cwd)
    assert outside.returncode == 2
    assert "inside an allocation, and this is not one; start with salloc" in outside.stderr
    disordered = shardwright(cluster, *over_hosts, cwd=cwd, within=allocation)
    assert disordered.returncode == 2
    assert "has node2, node1, but the allocation is node1, node2" in disordered.stderr

    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    ended = shardwright(cluster, *over_hosts, cwd=cwd, within=allocation)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line["loss"] for line in runs.metrics(cwd / "run")] == [
        line["loss"] for line in runs.metrics(uninterrupted)
    ]
    assert runs.weights(cwd / "run") == runs.weights(uninterrupted)
    assert [path.name for path in cwd.iterdir()] == ["run"], "a name was run"


@pytest.mark.timeout(600)  # a run and two jobs
def test_an_evaluation_is_a_job_that_gives_the_number_of_the_run(
    cluster: Cluster, uninterrupted: Path
) -> None:
    beside = sorted(uninterrupted.parent.iterdir())
    (logged,) = (line["eval_loss"] for line in lines(uninterrupted) if "eval_loss" in line)
    settings = ("launcher.nproc_per_node=1", "launcher.device=cpu", "launcher.cpus_per_rank=1")
    words = ("evaluate", str(uninterrupted), "--step", "latest", "--json", *TWO_NODES, *settings)
    ended = shardwright(cluster, *words, cwd=uninterrupted.parent)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(ended.stdout)
    assert found["metrics"]["eval_loss"] == logged
    assert found["world_size"] == 2
    assert re.search(r"job \d+: (RUNNING|COMPLETED) on node\[1-2\]", ended.stderr), ended.stderr
    assert sorted(uninterrupted.parent.iterdir()) == beside

    of_ranks = ("strategy=zero1", "strategy.extra={data_types: {keep_in_fp32_modules: auto}}")
    refused = shardwright(cluster, *words, *of_ranks, cwd=uninterrupted.parent)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "strategy.extra.data_types={'keep_in_fp32_modules': 'auto'} is what" in refused.stderr
    assert sorted(uninterrupted.parent.iterdir()) == beside


def test_the_doctor_measures_the_ranks_of_a_job(cluster: Cluster, tmp_path: Path) -> None:
    ended = shardwright(
        cluster,
        *("doctor", "--directory", "runs"),
        *(*TWO_NODES, "launcher.nproc_per_node=1", "launcher.device=cpu"),
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 on 2 node(s), cpu" in ended.stdout
    assert "all-reduce      right," in ended.stdout
    assert re.search(r"ok +links +[\d.,]+ GB/s between node1 and node2", ended.stdout), ended.stdout
    assert re.search(r"ok +answers +[\d.,]+ us between node1 and node2", ended.stdout), ended.stdout
    assert list(tmp_path.iterdir()) == []
