"""Every launcher starts real ranks, which learn what torchrun's learn."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.launchers.ranks.processes import rank_processes
from shardwright.train.run_directory import history
from tests.distributed.pool import free_port
from tests.e2e.cli import SAME, crash, finish, losses, shardwright, start, wait_for, wait_until
from tests.e2e.endings import assert_stopped
from tests.e2e.ssh import ADDRESSES, needs_ssh

Tiny = Callable[[str], tuple[str, ...]]
# What reaches a shell on its way would run here, or fall apart.
HOSTILE = "a b $(touch ran) %h 'q'"


@pytest.mark.parametrize("launcher", ["deepspeed", "accelerate"])
def test_two_ranks_on_this_machine(
    launcher: str, tiny: Tiny, tmp_path: Path, expected: list[float]
) -> None:
    ended = shardwright(
        *("train", *tiny("clm"), *SAME, f"launcher={launcher}"),
        "strategy.node_local_checkpoints=true",  # one rank of each node acts for its disk
        f'run_dir="{HOSTILE}"',
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / HOSTILE) == expected
    assert (tmp_path / HOSTILE / "final" / "model.safetensors").is_file()
    assert f"2 x cpu ({launcher})" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == [HOSTILE], "a name was run"


# --- over ssh -----------------------------------------------------------------------------------


@pytest.mark.wide
@needs_ssh
def test_deepspeed_over_a_hostfile_until_it_is_told_to_stop(
    tiny: Tiny, tmp_path: Path, ssh_port: int, expected: list[float]
) -> None:
    """Its ranks descend from sshd, so no signal to the launcher gets to them by itself."""
    hostfile, run_dir = tmp_path / "hosts", tmp_path / HOSTILE
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\nelsewhere slots=1\n")
    launcher = start(
        *("train", *tiny("clm"), *SAME, "trainer.max_steps=100000"),
        *("launcher=deepspeed", "launcher.nproc_per_node=1"),
        *(f"launcher.hostfile={hostfile}", "launcher.exclude=elsewhere"),
        *(f"launcher.ssh_port={ssh_port}", f'run_dir="{HOSTILE}"'),
        cwd=tmp_path,
    )
    try:
        wait_for(run_dir / "metrics.jsonl", launcher)
        wait_until(lambda: len(losses(run_dir)) >= len(expected))
        assert len(rank_processes(run_dir)) == 2
        launcher.terminate()
        ended = finish(launcher)
    finally:
        left = rank_processes(run_dir)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert ended.returncode == 75, ended
    where = assert_stopped(ended, run_dir)
    assert where.reason == f"SIGTERM to the launcher on {socket.gethostname()}"
    log = (run_dir / "logs" / "rank-1.log").read_text()
    assert f" [rank 1, {socket.gethostname()}/0] INFO shardwright.train" in log
    assert not left
    assert losses(run_dir)[: len(expected)] == expected
    assert {path.name for path in tmp_path.iterdir()} == {"hosts", HOSTILE}, "a name was run"


@needs_ssh
def test_a_host_that_is_not_reached_is_a_failure(tiny: Tiny, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=2\n")
    ended = shardwright(
        *("train", *tiny("clm"), *SAME, "launcher=deepspeed"),
        *(f"launcher.hostfile={hostfile}", f"launcher.ssh_port={free_port()}"),
        cwd=tmp_path,
    )
    assert ended.returncode == 1
    assert "host=127.0.0.1 was not reachable via ssh" in ended.stderr


@pytest.mark.wide
@needs_ssh
@pytest.mark.skipif(
    shutil.which("mpirun.openmpi") is None or shutil.which("ompi_info") is None,
    reason="needs Open MPI's mpirun (apt-get install openmpi-bin)",
)
def test_open_mpi_starts_the_ranks_of_a_hostfile(
    tiny: Tiny,
    tmp_path: Path,
    ssh_port: int,
    expected: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A rank alone on its node takes all cores, and sums of several threads round otherwise.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bin = tmp_path / "bin"
    bin.mkdir()
    # The plain name may be another MPI's.
    (bin / "mpirun").symlink_to(str(shutil.which("mpirun.openmpi")))
    monkeypatch.setenv("PATH", str(bin), prepend=":")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    cwd = tmp_path / "a b"
    cwd.mkdir()

    name = "$(touch ran) %h 'q'"
    ended = shardwright(
        *("train", *tiny("clm"), *SAME, "launcher=deepspeed", "launcher.nproc_per_node=1"),
        *("launcher.backend=openmpi", f"launcher.hostfile={hosts}"),
        *(f"launcher.ssh_port={ssh_port}", f'run_dir="{name}"'),
        cwd=cwd,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert losses(cwd / name) == pytest.approx(expected, rel=1e-6)
    assert "step 6/6" in ended.stdout, "mpirun's terminal has no columns for a bar"
    assert [path.name for path in cwd.iterdir()] == [name], "a name was run"


# --- several nodes ------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.timeout(600)  # two runs of 60 steps, and every rank started three times
def test_a_node_that_is_killed_comes_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rank alone on its node takes all cores, and sums of several threads round otherwise.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = (
        *tiny("clm"),
        *SAME,
        *("trainer.max_steps=60", "trainer.save_every_steps=5", "checkpoint.keep_last=2"),
        "launcher=torchrun",
    )
    alone = shardwright("train", *settings, "run_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr

    nodes = ("launcher.nodes=2", "launcher.nproc_per_node=1", "launcher.head_address=localhost")
    first = start("train", *settings, *nodes, "launcher.max_restarts=3", cwd=tmp_path)
    run_dir = tmp_path / "run"
    wait_until((run_dir / "config.yaml").is_file)
    second = start("join", str(run_dir), cwd=tmp_path)
    try:
        wait_until(lambda: any((run_dir / "checkpoints").glob("checkpoint-*")))
        crash(second)
        second = start("join", str(run_dir), cwd=tmp_path)
        ends = [finish(first), finish(second)]
    finally:
        for node in (first, second):
            if node.poll() is None:
                crash(node)
    assert [end.returncode for end in ends] == [0, 0], ends
    assert losses(run_dir) == losses(tmp_path / "alone")
    restart = history.read(run_dir)[-1]
    assert (restart["by"], restart["world_size"]) == ("torchrun", 2)
    assert restart["restart"] >= 1
    assert f"resuming from {restart['checkpoint']}\n" in ends[0].stdout
    assert "resuming from checkpoint-" in ends[0].stdout
