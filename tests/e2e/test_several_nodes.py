"""Ranks of several nodes, which are addresses of the loopback: each way of starting them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.cli import SAME, crash, finish, losses, shardwright, start, wait_until

Tiny = Callable[[str], tuple[str, ...]]
TWO_NODES = ("launcher.nodes=2", "launcher.nproc_per_node=1", "launcher.head_address=localhost")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank alone on its node takes all cores, and sums of several threads round otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def end(*nodes: subprocess.Popen[str]) -> None:
    for node in nodes:
        if node.poll() is None:
            crash(node)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [("launcher=accelerate",), ("launcher=torchrun", "launcher.rendezvous=static")],
    ids=["accelerate", "torchrun"],
)
def test_nodes_of_fixed_ranks_train_as_one_does(
    launcher: tuple[str, ...], tiny: Tiny, tmp_path: Path, expected: list[float]
) -> None:
    run_dir = tmp_path / "run"
    first = start("train", *tiny("clm"), *SAME, *TWO_NODES, *launcher, cwd=tmp_path)
    wait_until((run_dir / "config.yaml").is_file)
    second = start("join", str(run_dir), "--node-rank", "1", cwd=tmp_path)
    try:
        ends = [finish(first), finish(second)]
    finally:
        end(first, second)
    assert [ended.returncode for ended in ends] == [0, 0], ends
    assert losses(run_dir) == pytest.approx(expected, rel=1e-6)
    assert f"shardwright join {run_dir} --node-rank N" in ends[0].stdout
    assert "step 6/6" in ends[0].stdout
    assert (run_dir / "final" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)  # torchrun waits most of a minute for the lost node
def test_the_others_go_on_without_a_node_that_is_lost_for_good(tiny: Tiny, tmp_path: Path) -> None:
    settings = (
        *(*tiny("clm"), *SAME, "launcher=torchrun"),
        *("trainer.max_steps=60", "trainer.save_every_steps=5"),
    )
    alone = shardwright("train", *settings, "run_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr

    run_dir = tmp_path / "run"
    elastic = (*TWO_NODES, "launcher.min_nodes=1", "launcher.max_restarts=3")
    first = start("train", *settings, *elastic, cwd=tmp_path)
    wait_until((run_dir / "config.yaml").is_file)
    second = start("join", str(run_dir), cwd=tmp_path)
    try:
        wait_until(lambda: any((run_dir / "checkpoints").glob("checkpoint-*")))
        crash(second)
        ended = finish(first)
    finally:
        end(first, second)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    together, resumed, after = ended.stdout.partition("resuming from checkpoint-")
    assert "zero2 on 2 ranks" in together
    assert resumed
    assert "zero2 on 1 rank:" in after
    # The same global batch: the sums only round otherwise.
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
