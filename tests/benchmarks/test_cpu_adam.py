"""The comparison of CPU Adams runs from end to end, and both do the same arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.optimizers import needs_compiler

ROOT = Path(__file__).parents[2]


@pytest.mark.wide
@needs_compiler
@pytest.mark.timeout(600)
def test_both_take_the_same_steps_and_are_timed(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--parameters", "100000", "--repeats", "3", "--json", str(file)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_adam", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Ratio (DeepSpeed to torch) at 100,000 parameters and 1 threads" in ended.stdout
    figures = json.loads(file.read_text())
    medians = figures["seconds_per_step"]
    assert figures["ratio"] == pytest.approx(medians["torch"] / medians["deepspeed"])
    assert {name: len(each) for name, each in figures["seconds_of_each_step"].items()} == {
        "torch": 3,
        "deepspeed": 3,
    }
    assert 0 < figures["largest_difference_of_a_weight"] < 1e-6
    assert "deepspeed" in figures["versions"]


def test_sizes_that_measure_nothing_are_refused() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_adam", "--repeats", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert "--repeats at least 1" in ended.stderr
