"""What was measured of this machine becomes hardware, is kept, and is of that machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.commands import doctor, measured
from shardwright.launchers.machine import health
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan import hardware, kept
from shardwright.launchers.plan.hardware import GIB
from shardwright.train.errors import UserError

CPU = Machine(cores=8, ram_bytes=64 * GIB)
H200 = Machine(
    (9.0,) * 2, gpu_names=("NVIDIA H200",) * 2, gpu_memory_bytes=143_771 * 2**20, ram_bytes=GIB
)
DISK = {"free": 100 * GIB, "bytes_per_second": 2e9}


def rank(device: str, **speeds: Any) -> dict[str, Any]:
    found = {"training": {"fp32": 1e11, "bf16": 3e11}, "memory": 1e10, "host_link": None}
    return {
        "device": device,
        "all_reduce_bytes_per_second": 3e9,
        "speeds": found | speeds,
    }


def gpu(name: str) -> dict[str, Any]:
    training = {"fp32": 4e13, "tf32": 2e14, "bf16": 4.945e14, "fp16": 5e14}
    return rank(name, training=training, memory=3.84e12, host_link=5e10) | {
        "all_reduce_bytes_per_second": 3e11
    }


def test_cores_are_one_rank_that_has_them_all() -> None:
    found = kept.measured([rank("cpu"), rank("cpu")], CPU, DISK)
    assert (found.device, found.ranks) == ("cpu", 1)
    assert found.peak_flops("fp32") == 2e11
    assert found.peak_flops("bf16") == 6e11
    assert found.memory_gb_per_second == found.host_memory_gb_per_second == 20
    assert found.host_link_gb_per_second == 3
    efficiencies = (found.compute_efficiency, found.link_efficiency, found.memory_efficiency)
    assert efficiencies == (1, 1, 1)
    assert (found.host_memory_gib, found.nvme_gib, found.nvme_gb_per_second) == (64, 100, 2)

    shared = kept.shared(found, 4)
    assert shared.ranks == 4
    assert shared.peak_flops("fp32") == 5e10
    assert shared.memory_gb_per_second == 5
    assert shared.host_memory_gb_per_second == 20


def test_one_rank_has_no_links_to_measure() -> None:
    alone = rank("cpu") | {"all_reduce_bytes_per_second": None}
    found = kept.measured([alone], CPU, DISK)
    assert found.host_link_gb_per_second == hardware.shipped("cpu").host_link_gb_per_second
    assert found.link_efficiency == hardware.shipped("cpu").link_efficiency


def test_a_known_gpu_keeps_its_peaks_and_gets_its_efficiencies() -> None:
    found, shipped = kept.measured([gpu("NVIDIA H200")] * 2, H200, DISK), hardware.shipped("h200")
    assert found.peak_teraflops == shipped.peak_teraflops
    assert found.compute_efficiency == 0.5
    assert found.memory_efficiency == 0.8
    assert found.link_efficiency == pytest.approx(300 / 450, rel=1e-3)
    assert found.host_link_gb_per_second == 50
    assert found.devices == 2
    assert kept.shared(found, 1) == found


def test_of_another_gpu_the_peaks_are_what_was_reached() -> None:
    found = kept.measured([gpu("NVIDIA Foo 9")] * 2, H200, DISK)
    assert found.peak_flops("bf16") == 4.945e14
    assert found.peak_flops("fp8") is None
    assert found.compute_efficiency == found.link_efficiency == 1
    assert found.memory_gb_per_second == 3840
    assert found.nvlink_gb_per_second == 300
    assert found.memory_mib == 143_771


def test_it_is_kept_and_of_this_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.matching(CPU, "cpu") is None
    found = kept.measured([rank("cpu")], CPU, DISK)
    path = kept.place("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(kept.text(found, CPU, "now"))
    assert kept.matching(CPU, "cpu") == found
    assert kept.matching(Machine(cores=4, ram_bytes=64 * GIB), "cpu") is None
    assert kept.matching(CPU, "cuda") is None
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*-cpu.yaml"):
        kept.matching(CPU, "cpu")


def test_the_command_measures_once_and_when_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(health, "PROBE_BYTES", 2**22)
    asked: list[int] = []

    def of_ranks(config: Any, here: Machine, *, with_speeds: bool) -> doctor.Measured:
        assert with_speeds
        asked.append(config.launcher.world_size)
        return doctor.Measured([rank("cpu")] * config.launcher.world_size, [])

    monkeypatch.setattr(doctor, "measured", of_ranks)
    first = measured.chosen(["hardware=here"], None, CPU)
    assert asked == [2]
    assert f"measured this machine, kept in {kept.place('cpu')}" in capsys.readouterr().err
    assert measured.chosen(["hardware=here"], None, CPU) == first
    assert asked == [2], "it is known"
    assert f"hardware=here is {kept.place('cpu')}" in capsys.readouterr().err
    of_nodes = measured.chosen(["hardware=herex4x2", "hardware.nvme_gib=7"], None, CPU)
    assert of_nodes is not None
    assert (of_nodes.devices, of_nodes.nodes, of_nodes.nvme_gib) == (4, 2, 7)
    assert of_nodes.peak_flops("fp32") == 5e10
    # By its path it is hardware like any other.
    assert hardware.chosen([f"hardware={kept.place('cpu')}"]) == first
    measured.chosen(["hardware=here"], None, CPU, again=True)
    measured.chosen(["hardware=here"], None, Machine(cores=1, ram_bytes=GIB))
    assert asked == [2, 2, 1]


@pytest.mark.parametrize(
    ("words", "again", "message"),
    [
        (["hardware=h200"], True, "--measure measures this machine, for hardware=here; add that"),
        (["hardware=herex0"], False, "hardware=herex0: devices and nodes are counted from 1"),
        (["hardware=hera"], False, "unknown hardware hera"),
    ],
)
def test_bad_input(words: list[str], again: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measured.chosen(words, None, CPU, again=again)
