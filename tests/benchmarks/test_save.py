"""The benchmark of saves runs from end to end on a CPU, and its figures add up on paper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import Figures
from benchmarks.save import STRATEGIES, VARIANTS, Plan, freeze, shown, summary
from launchers.machine import Machine

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_save_has_steps_behind_it(strategy: str, variant: str, tmp_path: Path) -> None:
    plan = Plan("gpt2_tiny", [strategy], 2, 3, 4, 1, tmp_path, Machine(cores=2))
    config = freeze(plan, strategy, variant, tmp_path / "run")
    assert config.trainer.max_steps == 15
    assert config.trainer.save_every_steps == (None if variant == "none" else 4)
    assert config.checkpoint.asynchronous == (variant == "async")


def one_run(seconds: float, stalls: list[float]) -> Figures:
    return {"seconds": seconds, "stalls_seconds": stalls, "checkpoint_bytes": 2**30}


def test_a_save_costs_what_the_run_takes_longer() -> None:
    runs = {
        "none": [one_run(10, []), one_run(11, []), one_run(10, [])],
        "sync": [one_run(16, [2, 2, 2])] * 3,
        "async": [one_run(12, [0.5, 0.5, 0.5])] * 3,
    }
    figures = summary(runs, saves=3)
    assert figures["seconds_per_save"] == {"sync": 2.0, "async": pytest.approx(2 / 3)}
    assert figures["stall_seconds"] == {"sync": 2, "async": 0.5}
    assert figures["ratio"] == pytest.approx(3.0)
    row = shown({"strategies": {"ddp": figures}}).splitlines()[1].split()
    assert row == ["ddp", "2.000", "0.667", "3.00", "2.000", "0.500", "1,024", "MiB"]


def test_a_cost_below_the_noise_gives_no_ratio_and_a_failed_run_no_figures() -> None:
    runs = {"none": [one_run(10, [])], "sync": [one_run(12, [1])], "async": [one_run(9.9, [0.1])]}
    assert summary(runs, saves=1)["ratio"] is None
    failed = summary({**runs, "async": [{"error": "no space"}]}, saves=1)
    assert failed == {"error": "no space", "ratio": None}
    assert "failed:\nno space" in shown({"strategies": {"ddp": failed}})


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--model", "gpt2_tiny", "--strategy", "ddp", "--saves", "2", "--repeats", "1"]
    arguments += ["--steps-between", "2", "--directory", str(tmp_path), "--json", str(file)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.save", *arguments],
        cwd=ROOT,
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results: Figures = json.loads(file.read_text())
    assert {"python", "torch", "transformers", "accelerate"} <= set(results["versions"])
    assert "ratio" in results
    figures = results["strategies"]["ddp"]
    assert set(figures["seconds"]) == {"none", "sync", "async"}
    assert figures["checkpoint_bytes"] > 2**20
    assert figures["stall_seconds"]["sync"] > 0
