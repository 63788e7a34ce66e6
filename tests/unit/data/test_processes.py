"""How many processes a preparation has: what memory allows, of one on each core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.data import prepare
from shardwright.train.data.sources import shards as of_corpus
from shardwright.train.data.tokens import packing, processes, shard_workers
from shardwright.train.data.tokens.processes import (
    EACH_BYTES,
    FILTER_BYTES,
    affordable,
    cores_for,
)
from shardwright.train.process import cores


@pytest.mark.parametrize(
    ("wanted", "available", "expected"),
    [(64, 10 * 2**30, 20), (8, 10 * 2**30, 8), (4, 2**20, 1), (64, None, 64)],
)
def test_there_are_no_more_than_memory_allows(
    wanted: int, available: int | None, expected: int
) -> None:
    assert affordable(wanted, available, EACH_BYTES) == expected


def test_what_memory_takes_away_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="shardwright.train")
    monkeypatch.setattr(processes, "available_bytes", lambda: 3 * 2**30)
    assert cores_for(range(4), 16, has_filter=False) == range(4)
    assert not caplog.messages
    assert len(cores_for(range(64), 16, has_filter=False)) == 6
    assert len(cores_for(range(64), 16, has_filter=True)) == 4
    assert caplog.messages == [
        "6 of 16 processes, one for each core: each may take 537 MB of memory, and 3.2 GB are free",
        "4 of 16 processes, one for each core: each may take 805 MB of memory, and 3.2 GB are free",
    ]
    assert (EACH_BYTES + FILTER_BYTES) * 4 == 3 * 2**30


def test_a_preparation_keeps_to_it(
    corpus: Path,
    make_config: Callable[..., Any],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="shardwright.train")
    (first, *_) = cores.all_cores()
    monkeypatch.setattr(cores, "_before_binding", {first, 10_001, 10_002, 10_003})
    monkeypatch.setattr(processes, "available_bytes", lambda: 2 * EACH_BYTES)
    monkeypatch.setattr(of_corpus, "LEAST_BYTES", 5_000)
    monkeypatch.setattr(packing, "SIDE_BY_SIDE_FROM_CHARACTERS", 1)
    started: list[int] = []
    real = shard_workers._started

    def start(work: Any, chosen: Any, all_cores: Any) -> Any:
        started.append(len(chosen))
        return real(work, chosen, all_cores)

    monkeypatch.setattr(shard_workers, "_started", start)
    prepare(make_config(), run_dir)
    assert started == [2]
    line = (
        "2 of 4 processes, one for each core: each may take 537 MB of memory, and 1.1 GB are free"
    )
    assert line in caplog.messages


# --- what there is --------------------------------------------------------------------------------


GIB = 2**30
"""Of memory."""


def written(folder: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(str(text))
    return folder


@pytest.mark.parametrize(
    ("groups", "cgroup", "expected"),
    [
        ({}, "0::/", 20),
        (
            {
                "a/memory.max": 8 * GIB,
                "a/memory.current": 6 * GIB,
                "a/memory.stat": f"anon 1\ninactive_file {3 * GIB}\n",
                "a/b/memory.max": "max",
                "a/b/memory.current": 1,
                "a/b/memory.stat": "inactive_file 0\n",
            },
            "0::/a/b",
            5,
        ),
        (
            {
                "memory/memory.limit_in_bytes": 4 * GIB,
                "memory/memory.usage_in_bytes": 3 * GIB,
                "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
            },
            "9:name=systemd:/\n4:memory:/seen/by/the/host/alone",
            2,
        ),
        (
            {"memory.max": GIB, "memory.current": 2 * GIB, "memory.stat": ""},
            "0::/",
            0,
        ),
    ],
    ids=["none", "above", "older", "used up"],
)
def test_memory_is_that_of_the_machine_and_of_control_groups(
    tmp_path: Path, groups: dict[str, object], cgroup: str, expected: int
) -> None:
    meminfo = f"MemTotal: {2**25} kB\nMemAvailable:   {20 * 2**20} kB\n"
    proc = written(tmp_path / "proc", {"meminfo": meminfo, "self/cgroup": cgroup})
    found = processes.available_bytes(proc, written(tmp_path / "groups", groups))
    assert found == expected * GIB


def test_nobody_tells(tmp_path: Path) -> None:
    assert processes.available_bytes(tmp_path, tmp_path) is None
    assert (processes.available_bytes() or 0) > 2**20
