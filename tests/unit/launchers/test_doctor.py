"""What the doctor says of many ranks, and how it says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.commands import doctor
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.machine.health import Finding
from shardwright.train.errors import UserError


def rank(number: int, host: str, **other: Any) -> dict[str, Any]:
    measured: dict[str, Any] = {
        "rank": number,
        "host": host,
        "device": "cpu",
        "clock": 1000.0,
        "matmul_flops": 50e9,
        "all_reduce_bytes_per_second": 2e9,
        "all_gather_bytes_per_second": 1e9,
        "small_all_reduce_seconds": 1e-4,
        "next_node": None,
        "link_bytes_per_second": None,
    }
    return measured | other


def by_topic(measured: list[dict[str, Any]]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in doctor.judge_ranks(measured)}


def test_all_well() -> None:
    found = by_topic([rank(0, "a"), rank(1, "a"), rank(2, "b"), rank(3, "b")])
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["ranks"].text == "4 on 2 node(s), cpu"
    assert found["all-reduce"].text == "right, 2.00 GB/s through each rank's link"
    assert found["latency"].text == "100 us for an empty all-reduce"


def test_the_slowest_node_is_named() -> None:
    nodes = [rank(i, host) for i, host in enumerate(("a", "b", "c"))]
    nodes[1]["matmul_flops"] = 20e9
    found = by_topic(nodes)["matrix product"]
    assert found.state == "note"
    assert found.text == (
        "b is the slowest with 20.0 GFLOP/s a rank, 40% of the median: it holds up all the others"
    )
    assert "--exclude=b" in found.remedy


def test_the_slowest_link_is_named() -> None:
    nodes = [
        rank(0, "a", next_node="b", link_bytes_per_second=9e9),
        rank(1, "b", next_node="c", link_bytes_per_second=1e9),
        rank(2, "c", next_node="a", link_bytes_per_second=9e9),
    ]
    found = by_topic(nodes)["link"]
    assert found.text.startswith("b to c is the slowest with 1.0 GB/s")
    assert "the cable" in found.remedy


def test_clocks_that_differ_are_noted() -> None:
    found = by_topic([rank(0, "a"), rank(1, "b", clock=1012.0)])["clocks"]
    assert found.text == "b is 12.0 s ahead of a: times in their logs do not agree"


def test_one_rank_has_no_collectives() -> None:
    alone = rank(
        0,
        "a",
        all_reduce_bytes_per_second=None,
        all_gather_bytes_per_second=None,
        small_all_reduce_seconds=None,
    )
    assert set(by_topic([alone])) == {"ranks", "matrix product"}


def test_each_remedy_stands_below_its_finding() -> None:
    shown = doctor.text(
        [
            Finding("cores", "ok", "8"),
            Finding("/dev/shm", "wrong", "64 MiB", "docker run --shm-size=8g"),
        ]
    )
    assert shown.splitlines() == [
        "ok    cores     8",
        "WRONG /dev/shm  64 MiB",
        "                -> docker run --shm-size=8g",
        "",
        "1 wrong, 0 worth a look",
    ]


def test_a_hostfile_says_how_many_ranks_measure(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=3\nnode2 slots=3\n")
    config = doctor.asked_for(
        ["launcher=deepspeed", f"launcher.hostfile={hosts}", "launcher.device=cpu"],
        Machine(),
        tmp_path,
    )
    assert config.launcher.world_size == 6


def test_a_jobs_ranks_are_counted_by_its_gpus_not_by_those_of_a_login_node(tmp_path: Path) -> None:
    overrides = ["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4"]
    config = doctor.asked_for(overrides, Machine(), tmp_path)
    assert (config.launcher.device, config.launcher.world_size) == ("cuda", 8)


def test_nodes_that_nobody_would_start_are_refused(tmp_path: Path) -> None:
    overrides = ["launcher=torchrun", "launcher.nodes=2", "launcher.head_address=node1"]
    with pytest.raises(UserError, match=r"launcher\.nodes=2 starts only the ranks of this node"):
        doctor.asked_for(overrides, Machine(), tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launcher.nproc=2", "unknown key launcher.nproc"),
        ("launcher.nproc_per_node=0", "launcher.nproc_per_node=0: must be at least 1"),
        ("precision=fp16", "precision.compute_dtype=fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_is_said_before_a_minute_of_looking(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(*arguments: object) -> None:
        raise AssertionError("it has looked at the machine first")

    monkeypatch.setattr(doctor.health, "look", looked)
    given = ("--directory", str(tmp_path), "launcher=torchrun", "launcher.device=cpu", override)
    with pytest.raises(UserError) as error:
        doctor.main(given)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_is_to_grow_measures_too(tmp_path: Path) -> None:
    grows = ["trainer.batch_warmup_from=16", "trainer.batch_warmup_samples=99"]
    run = doctor.asked_for([*grows, "launcher.nproc_per_node=2"], Machine(cores=2), tmp_path)
    assert (run.trainer.global_batch_size, run.trainer.batch_warmup_from) == (2, None)
