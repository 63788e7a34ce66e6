"""The benchmark of starts runs, and its figures add up on paper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.startup import BARE, DRY_RUN, IMPORT, ratio, shown, summary

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "example_scripts"


def test_a_ratio_is_the_peers_median_over_ours() -> None:
    peer = summary([{"s": 4.0}, {"s": 6.0}, {"s": 9.0}], "s")
    ours = summary([{"s": 2.0}, {"s": 3.0}, {"s": 3.0}], "s")
    assert (peer["seconds"], peer["spread"]) == (6.0, 5 / 6)
    assert ratio(peer, ours) == 2.0
    assert ratio(peer, summary([{"error": "no"}, {"s": 1.0}], "s")) is None


def ran(tmp_path: Path, *arguments: str) -> tuple[dict, str]:
    file = tmp_path / "figures.json"
    where = ["--directory", str(tmp_path), "--json", str(file)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--repeats", "1", *arguments, *where],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(file.read_text()), ended.stdout


def test_the_dry_run_is_timed_beside_hydras_import(tmp_path: Path) -> None:
    results, said = ran(tmp_path, "--dry-run-only")
    assert set(results["dry_run"]["commands"]) == {IMPORT, BARE, DRY_RUN}
    assert all(len(f["seconds_of_each_run"]) == 3 for f in results["dry_run"]["commands"].values())
    assert results["ratio"] == results["dry_run"]["ratio"] > 0
    assert said.rstrip().endswith(shown(results))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_first_steps_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    results, _ = ran(tmp_path, "--quick", "--examples", str(SCRIPTS))
    assert results["first_step"]["model"] == "roberta_tiny"
    assert results["first_step"]["ratio"] > 0
