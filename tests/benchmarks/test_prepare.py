"""The benchmark of preparations runs, and its figures add up on paper."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prepare import OURS, PEER, ratio, shown, summary
from benchmarks.table import prepare

ROOT = Path(__file__).parents[2]


def figures(seconds: float, peak: int = 5) -> dict[str, Any]:
    return {"seconds": seconds, "peak_memory_bytes": peak, "peak_memory_of_all_bytes": 2 * peak}


def test_a_ratio_is_the_peers_median_over_ours() -> None:
    peer = summary([figures(4.0), figures(6.0), figures(9.0)], megabytes=12.0)
    ours = summary([figures(0.2, 7), figures(0.3), figures(0.3)], megabytes=12.0)
    assert (peer["seconds"], peer["spread"], peer["megabytes_per_second"]) == (6.0, 5 / 6, 2.0)
    assert (ours["peak_memory_bytes"], ours["peak_memory_of_all_bytes"]) == (7, 14)
    assert ratio(peer, ours) == 20.0
    failed = summary([figures(1.0), {"error": "no"}], megabytes=12.0)
    assert ratio(peer, failed) is None


def test_the_table_has_what_was_measured_of_a_whole_corpus() -> None:
    sides = {PEER: {"spread": 0.1}, OURS: {"spread": 0.2}}
    corpus = {"processes": {"2": sides}, "ratio": {"2": 21.04}}
    found: dict[str, Any] = {"tiny": False, "corpora": {"embedded": corpus}}
    value = prepare("embedded", "2")(found)
    assert value is not None
    assert (value.ratio, value.spread) == ("21.0", 0.2)
    assert prepare("embedded", "1")(found) is None
    assert prepare("repeated", "2")(found) is None
    assert prepare("embedded", "2")({**found, "tiny": True}) is None


@pytest.mark.slow
def test_both_sides_make_the_same_documents_into_about_as_many_tokens(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    where = ["--directory", str(tmp_path), "--json", str(file)]
    quick = ["--quick", "--repeats", "1", "--processes", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.prepare", *quick, *where],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(file.read_text())
    assert ended.stdout.rstrip().endswith(shown(results))
    assert results["ratio"] > 0
    sides = results["corpora"]["embedded"]["processes"]["1"]
    assert sides[OURS]["documents"] == sides[PEER]["documents"] == 20
    assert sides[OURS]["tokens"] == pytest.approx(sides[PEER]["tokens"], rel=0.05)
    assert all(each["peak_memory_bytes"] > 10 * 2**20 for each in sides.values())
    assert not [path for path in tmp_path.iterdir() if path != file]
