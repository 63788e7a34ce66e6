"""What a point has to itself: devices, cores or a host's slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.sweep import hosts, locally
from shardwright.launchers.sweep.definition import from_tree
from shardwright.train.errors import UserError

GPUS = ["0", "1", "2", "3"]
CORES = [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("tree", "ranks", "groups", "cores_each"),
    [
        ({}, None, ["0", "1", "2", "3"], 2),
        ({}, 2, ["0,1", "2,3"], 4),
        ({"max_parallel": 2}, None, ["0,1", "2,3"], 4),
        ({"max_parallel": 1}, 2, ["0,1"], 8),
        ({"devices_per_point": 3}, 1, ["0,1,2"], 8),
    ],
)
def test_gpus(tree: dict[str, Any], ranks: int | None, groups: list[str], cores_each: int) -> None:
    found = locally.slots(from_tree(tree), GPUS, CORES, ranks)
    assert [slot.environment()["CUDA_VISIBLE_DEVICES"] for slot in found] == groups
    assert [len(slot.cores) for slot in found] == [cores_each] * len(groups)
    assert len({core for slot in found for core in slot.cores}) == sum(len(s.cores) for s in found)


@pytest.mark.parametrize(
    ("tree", "cores"),
    [
        ({}, [tuple(CORES)]),
        ({"max_parallel": 2}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ({"max_parallel": 3}, [(0, 1), (2, 3), (4, 5)]),
        ({"devices_per_point": 4}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ({"max_parallel": 1, "devices_per_point": 2}, [(0, 1)]),
        ({"max_parallel": 10}, [(n % 8,) for n in range(10)]),
    ],
)
def test_cores(tree: dict[str, Any], cores: list[tuple[int, ...]]) -> None:
    found = locally.slots(from_tree(tree), [], CORES, None)
    assert [slot.cores for slot in found] == cores
    assert not any(slot.environment() for slot in found)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(UserError, match="4 points at a time with 2 GPUs each need 8, and this mac"):
        locally.slots(from_tree({"max_parallel": 4, "devices_per_point": 2}), GPUS, CORES, None)
    with pytest.raises(UserError, match="1 point at a time with 8 GPUs each need 8, and this mach"):
        locally.slots(from_tree({}), GPUS, CORES, 8)
    with pytest.raises(UserError, match="sweep.devices_per_point=9 is more than the 8 core"):
        locally.slots(from_tree({"devices_per_point": 9}), [], CORES, None)


def test_devices_are_those_that_are_visible() -> None:
    three = Machine(compute_capabilities=(9.0,) * 3, cuda_visible_devices="")
    assert locally.devices_of(three) == ["0", "1", "2"]
    chosen = Machine(compute_capabilities=(9.0,) * 2, cuda_visible_devices="5, 7")
    assert locally.devices_of(chosen) == ["5", "7"]
    assert locally.devices_of(Machine(compute_capabilities=(9.0,), torch_has_cuda=False)) == []


HOSTS = {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("tree", "ranks", "labels"),
    [
        ({}, None, ["a:0,1,2,3", "b:0,1,2,3"]),
        ({}, 2, ["a:0,1", "b:0,1", "a:2,3", "b:2,3"]),
        ({"devices_per_point": 3}, None, ["a:0,1,2", "b:0,1,2"]),
        ({"max_parallel": 1}, None, ["a:0,1,2,3"]),
    ],
)
def test_hosts(tree: dict[str, Any], ranks: int | None, labels: list[str]) -> None:
    found = hosts.divided(from_tree(tree), HOSTS, ranks)
    assert [slot.label for slot in found] == labels
    assert found[0].words == (f"launcher.include='{labels[0]}'", "launcher.exclude=null")


def test_hosts_that_are_too_small_or_too_few_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a point with 8 slots is on one host, and a host .* has 4"):
        hosts.divided(from_tree({}), HOSTS, 8)
    with pytest.raises(UserError, match="sweep.max_parallel=3 is more than the 2 point"):
        hosts.divided(from_tree({"max_parallel": 3}), HOSTS, None)
    with pytest.raises(UserError, match=r"launcher.hostfile=.* cannot be read .*slots=8"):
        hosts.slots(from_tree({}), tmp_path / "none", None, None)
