"""What the doctor says of one machine, judged from facts, and once from the real one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

import pytest

from shardwright.launchers.machine import health
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.machine.health import GIB, MIB, Finding, Gpus

H100 = "NVIDIA H100 80GB HBM3"


def wrong(findings: Iterable[Finding]) -> Finding:
    (found,) = (finding for finding in findings if finding.state != "ok")
    return found


def test_a_machine_that_runs_these_tests_has_nothing_wrong_but_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SLOW_DISK_BYTES_PER_SECOND", 0)  # others may write beside it
    found = health.look(tmp_path / "runs", Machine(cores=1), os.environ)
    topics = {finding.topic for finding in found}
    assert {"packages", "gpus", "operators", "memory", "/dev/shm", "disk", "ports"} <= topics
    assert [f for f in found if f.topic in ("packages", "disk", "memory") and f.state != "ok"] == []
    assert list(tmp_path.iterdir()) == [], "looking leaves something behind"


def test_a_package_that_another_cannot_work_with_is_named() -> None:
    found = wrong(
        health.python_and_packages(
            {"torch": "2.9.0", "numpy": "2.1"},
            {"shardwright": ["torch>=2.11,<2.14", "numpy>=2", "pytest; extra == 'dev'"]},
        )
    )
    assert found.state == "wrong"
    assert found.text == "shardwright needs torch<2.14,>=2.11, found 2.9.0"
    assert found.remedy == "pip install 'torch<2.14,>=2.11'"


def test_a_missing_package_is_named() -> None:
    found = wrong(health.python_and_packages({}, {"accelerate": ["psutil"]}))
    assert found.text == "accelerate needs psutil, not installed"


def test_gpus_are_counted_with_their_links() -> None:
    (found,) = health.gpus(Gpus((H100,) * 8, (80 * GIB,) * 8, (13, 0), ("NV18",) * 56, (13, 0)))
    assert found.text == f"8 x {H100}, 80 GiB each, linked by NV18"


def test_gpus_with_a_torch_for_cpus_are_an_error() -> None:
    found = wrong(health.gpus(Gpus((H100,), (80 * GIB,), (13, 0))))
    assert found.state == "wrong"
    assert "the installed torch is a CPU build" in found.text


def test_a_driver_older_than_torch_is_an_error() -> None:
    found = wrong(health.gpus(Gpus((H100,), (80 * GIB,), (12, 8), (), (13, 0))))
    assert found.text == "the driver supports CUDA 12.8, torch was built with 13.0"


def test_gpus_of_two_kinds_are_noted() -> None:
    found = wrong(health.gpus(Gpus((H100, "NVIDIA A100"), (80 * GIB,) * 2, None, (), (13, 0))))
    assert "not all alike" in found.text


def test_links_are_read_from_the_topology_that_nvidia_smi_prints() -> None:
    topology = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV12\tPXB\t0-31\t0
GPU1\tNV12\t X \tSYS\t0-31\t0
NIC0\tPXB\tSYS\t X
Legend:
  SYS  = Connection traversing PCIe as well as the SMP interconnect
"""
    assert health.parse_links(topology) == ("NV12", "PXB", "NV12", "SYS")


def test_an_operator_that_cannot_be_built_names_the_setting_that_needs_it() -> None:
    found = wrong(health.operators({"cpu_adam": True, "async_io": False}, []))
    assert found.text == "async_io cannot be built, strategy=zero3_nvme will not start"
    assert "libaio-dev" in found.remedy


def test_the_lock_of_a_killed_build_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "py311_cpu" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (left,) = health._abandoned_locks()
    found = wrong(health.operators({"cpu_adam": True, "async_io": True}, [left]))
    assert found.state == "wrong"
    assert found.remedy == f"remove it: rm {lock}"


def test_less_time_than_cores_is_noted() -> None:
    found = wrong(health.cores(64, 3.5))
    assert found.text == "64 cores visible, but the control group grants the time of 3.5"
    assert "OMP_NUM_THREADS" in found.remedy


def test_a_tight_control_group_is_an_error() -> None:
    meminfo = {"MemTotal": 64 * GIB, "MemAvailable": 60 * GIB}
    found = wrong(health.host_memory(meminfo, GIB))
    assert "limited to 1.0 GiB by the control group" in found.text
    assert list(health.host_memory(meminfo, 2**63 - 1)) == [
        Finding("memory", "ok", "64.0 GiB, 60.0 GiB available")
    ]


def test_dockers_default_of_shared_memory_is_an_error() -> None:
    found = wrong(health.shared_memory(64 * MIB))
    assert found.text == "64 MiB: ranks die with a bus error"
    assert "--shm-size" in found.remedy


@pytest.mark.parametrize(("hard", "ranks", "is_wrong"), [(4096, 64, False), (4096, 2048, True)])
def test_open_files_are_judged_by_the_hard_limit_and_the_number_of_ranks(
    hard: int, ranks: int, is_wrong: bool
) -> None:
    found = list(health.limits(256, hard, ranks))
    if is_wrong:
        assert "4,096 allowed a process at most; 2,048 ranks may need 7,168" in wrong(found).text
        assert "--ulimit nofile=65536" in wrong(found).remedy
    else:
        assert found == [Finding("open files", "ok", "4096 allowed a process")]


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_directory_that_may_not_be_written_to_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "is not writable" in wrong(health.disk(tmp_path, MIB)).text


def test_a_disk_without_room_is_an_error(tmp_path: Path) -> None:
    found = wrong(health.disk(tmp_path, probe_bytes=2**62))
    assert "no room for a checkpoint" in found.text


def test_a_clock_that_is_off_is_noted() -> None:
    assert "+7.5 s from the clock" in wrong(health.clock(7.5, True)).text
    assert wrong(health.clock(0.0, False)).remedy == "timedatectl set-ntp true"


def test_a_host_name_that_does_not_resolve_is_noted() -> None:
    found = wrong(health.host_name("node7", []))
    assert found.text == "node7 does not resolve: other nodes cannot reach it by that name"
    assert wrong(health.host_name("node7", ["127.0.1.1"])).state == "note"
    assert next(health.host_name("node7", ["10.1.2.3", "127.0.0.1"])).state == "ok"


def test_a_taken_port_is_noted() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert (
            f"{number}, torchrun's default rendezvous port, is in use"
            == wrong(health.port(number)).text
        )


def test_variables_that_slow_runs_down_are_named() -> None:
    environment = {"CUDA_LAUNCH_BLOCKING": "1", "NCCL_P2P_DISABLE": "0"}
    found = wrong(health.settings(environment))
    assert found.text == "CUDA_LAUNCH_BLOCKING=1: every kernel is waited for"
    assert found.remedy == "unset CUDA_LAUNCH_BLOCKING"
