"""What the doctor says of many ranks, and how it says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.commands import doctor
from shardwright.launchers.machine import among_ranks, nccl
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.machine.health import Finding
from shardwright.train.errors import UserError
from shardwright.train.process import nccl_log


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
        "local_rank": 0,
        "pairs": [],
    }
    return measured | other


def by_topic(measured: list[dict[str, Any]]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in among_ranks.judge(measured)}


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
        "b is the slowest with 20.0 GFLOP/s a rank, 40% of the median: it holds up all others"
    )
    assert "--exclude=b" in found.remedy


def test_a_device_is_compared_with_all_devices_of_the_job() -> None:
    ranks = [rank(i, "ab"[i // 2], local_rank=i % 2) for i in range(4)]
    assert by_topic(ranks)["matrix product"].state == "ok"
    ranks[3]["matmul_flops"] = 30e9
    found = by_topic(ranks)["matrix product"]
    assert found.state == "note"
    assert found.text == (
        "rank 3 (b, its device 1) is the slowest with 30.0 GFLOP/s a rank, 60% of the median: "
        "it holds up all others"
    )
    assert "nvidia-smi" in found.remedy


Links = dict[tuple[str, str], float]


def ranks_of(speeds: Links, answers: Links | None = None) -> list[dict[str, Any]]:
    """Return a rank for each node, the first of which have the pairs."""
    hosts = list(dict.fromkeys(node for pair in speeds for node in pair))
    found = [rank(number, host) for number, host in enumerate(hosts)]
    for pair, speed in speeds.items():
        seconds = (answers or {}).get(pair, 1e-4)
        found[hosts.index(pair[0])]["pairs"].append(
            {"nodes": list(pair), "bytes_per_second": speed, "seconds": seconds}
        )
    return found


def all_pairs(nodes: str, speed: float = 9e9, **slow: float) -> Links:
    """Return the pairs of nodes of one letter each, ``slow`` by both letters."""
    return {
        (one, other): slow.get(one + other, speed)
        for place, one in enumerate(nodes)
        for other in nodes[place + 1 :]
    }


@pytest.mark.parametrize(
    ("speeds", "text"),
    [
        (all_pairs("abc", ab=1e9), "a and b: 1.00 GB/s; usual among the 3 pairs of nodes: 9.00"),
        (
            all_pairs("abcd", bd=1e9, ac=2e9),
            "b and d: 1.00 GB/s, a and c: 2.00 GB/s; usual among the 6 pairs of nodes: 9.00",
        ),
        (
            all_pairs("abc", ac=1e9, bc=1e9),
            "c is slow to every other node (1.00 GB/s); usual among the 3 pairs",
        ),
        (
            all_pairs("abcde", ac=1e9, bc=1e9, cd=1e9, ce=1e9, ab=2e9),
            "c is slow to every other node (1.00 GB/s), a and b: 2.00 GB/s; usual",
        ),
        (
            all_pairs("abcdefgh", ab=1e9, bc=1e9, cd=1e9, de=1e9, ef=1e9, fg=1e9),
            "a and b: 1.00 GB/s, b and c: 1.00 GB/s, c and d: 1.00 GB/s, d and e: 1.00 GB/s, 2",
        ),
    ],
)
def test_what_is_slow_among_nodes_is_named(speeds: Links, text: str) -> None:
    found = by_topic(ranks_of(speeds))["links"]
    assert found.state == "note"
    assert found.text.startswith(text)
    assert "the cable" in found.remedy


def test_links_that_differ_a_little_are_all_well() -> None:
    found = by_topic(ranks_of(all_pairs("abcd", ab=7e9, cd=6e9)))
    assert found["links"].state == "ok"
    assert found["links"].text == "6.00 GB/s between c and d, the slowest of 6; usual 9.00 GB/s"
    assert found["answers"].text == "100 us between a and b, the slowest"
    (one,) = [
        finding
        for finding in by_topic(ranks_of(all_pairs("ab"))).values()
        if finding.topic == "links"
    ]
    assert one.text == "9.00 GB/s between a and b, the slowest of 1; usual 9.00 GB/s"


def test_a_pair_that_answers_late_is_named() -> None:
    answers = {("a", "c"): 2e-3}
    found = by_topic(ranks_of(all_pairs("abcd"), answers))["answers"]
    assert found.state == "note"
    assert found.text == "a and c: 2,000 us; usual: 100 us"


# --- NCCL's log -----------------------------------------------------------------------------------

LOG = """\
node1:71:71 [0] NCCL INFO Bootstrap: Using eth0:10.0.0.1<0>
node1:71:71 [0] NCCL INFO NCCL version 2.27.5+cuda12.9
node1:71:95 [0] NCCL INFO NCCL_SOCKET_IFNAME set by environment to eth0
node1:71:95 [0] NCCL INFO NCCL_IB_DISABLE set by environment to 1.
node1:71:95 [0] NCCL INFO Using network {network}
node1:71:95 [0] NCCL INFO === System : maxBw 24.0 totalBw 48.0 ===
node1:71:95 [0] NCCL INFO CPU/0-0 (1/1/2)
node1:71:95 [0] NCCL INFO + PCI[24.0] - GPU/0-1b000 (0)
node1:71:95 [0] NCCL INFO ==========================================
node1:71:95 [0] NCCL INFO Channel 00/02 : 0 1
node1:71:95 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
node1:71:95 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM
node1:71:95 [0] NCCL INFO Channel 00/0 : 1[1] -> 2[0] [send] via NET/{network}/0
a line of something else
node1:71:95 [0] misc/socket.cc:99 NCCL WARN Connect failed
node1:71:95 [0] NCCL WARN Call to ibv_create_qp failed
"""


def test_nccls_log_says_what_it_found_and_chose() -> None:
    said = nccl.read([LOG.format(network="IB"), LOG.format(network="IB")])
    assert said.version == "2.27.5+cuda12.9"
    assert dict(said.networks) == {"IB": 2}
    assert dict(said.ways) == {"P2P/CUMEM": 4, "NET/IB/0": 2}
    assert said.variables == {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_IB_DISABLE": "1"}
    assert said.topology == (
        "fastest link 24.0 GB/s, all of a GPU 48.0 GB/s",
        "CPU/0-0 (1/1/2)",
        "+ PCI[24.0] - GPU/0-1b000 (0)",
    )
    shown = [(finding.state, finding.topic, finding.text) for finding in nccl.judge(said, 2)]
    assert shown == [
        ("ok", "NCCL", "2.27.5+cuda12.9, network: IB"),
        ("ok", "NCCL variables", "NCCL_IB_DISABLE=1 NCCL_SOCKET_IFNAME=eth0"),
        ("ok", "NCCL channels", "4 over P2P/CUMEM, 2 over NET/IB/0"),
        ("note", "NCCL", "node1: Connect failed"),
        ("note", "NCCL", "node1: Call to ibv_create_qp failed"),
    ]


def test_nodes_that_talk_over_tcp_are_noted() -> None:
    said = nccl.read([LOG.format(network="Socket")])
    (found,) = [f for f in nccl.judge(said, 2) if f.topic == "NCCL channels"]
    assert found.state == "note"
    assert found.text.endswith("nodes exchange tensors over TCP")
    assert "NCCL_IB_HCA" in found.remedy
    assert {f.state for f in nccl.judge(said, 1) if f.topic == "NCCL channels"} == {"ok"}


def test_without_a_log_that_is_said() -> None:
    (found,) = nccl.judge(nccl.read([]), 2)
    assert found.text == "it has left no log of what it found and chose"


def test_nccl_writes_where_the_doctor_looks(tmp_path: Path) -> None:
    asked = nccl_log.variables(tmp_path, {"NCCL_DEBUG_SUBSYS": "ALL"})
    assert asked == {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "ALL",
        "NCCL_DEBUG_FILE": f"{tmp_path}/nccl-%h-%p.log",
    }
    written = asked["NCCL_DEBUG_FILE"].replace("%h", "node1").replace("%p", "71")
    Path(written).write_text("")
    assert [str(path) for path in tmp_path.glob(nccl_log.FILES)] == [written]


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
