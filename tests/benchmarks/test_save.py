"""The benchmark of saves runs from end to end on a CPU, and its figures add up on paper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.report import Figures
from benchmarks.save import STRATEGIES, Plan, freeze, shown, summary
from benchmarks.timed_saves import Stretches
from shardwright.launchers.machine.facts import Machine

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_composes(strategy: str, tmp_path: Path) -> None:
    plan = Plan("gpt2_tiny", [strategy], 2, 3, 4, tmp_path, Machine(cores=2))
    config = freeze(plan, strategy, tmp_path / "run")
    assert config.trainer.max_steps == 2 + 3 * 3 * 4
    assert config.trainer.save_every_steps is None, "the benchmark saves itself"


def test_each_way_to_save_begins_its_stretches_in_turn() -> None:
    calls: list[Any] = []
    saver: Any = SimpleNamespace(save=lambda: calls.append(saver.in_background), wait=lambda: None)
    trainer: Any = SimpleNamespace(saver=saver)
    stretches = Stretches(trainer, warmup_steps=2, rounds=2, steps=3)
    saved_at = []
    for step in range(1, 2 + 2 * 3 * 3 + 1):
        before = len(calls)
        stretches.on_step_end(None, SimpleNamespace(global_step=step), None)
        saved_at += [step] * (len(calls) - before)
    assert stretches.ways == ["none", "sync", "async", "async", "sync", "none"]
    assert saved_at == [5, 8, 11, 14]
    assert calls == [False, True, True, False]
    assert {way: len(each) for way, each in stretches.seconds.items()} == {
        "none": 2,
        "sync": 2,
        "async": 2,
    }


def test_a_save_costs_what_its_stretch_takes_longer_than_its_neighbour() -> None:
    figures = summary(
        {
            "seconds": {"none": [10, 30, 10], "sync": [13, 33, 14], "async": [11, 31, 11]},
            "stall_seconds": {"sync": [2, 2, 3], "async": [0.5, 0.5, 0.5]},
            "checkpoint_bytes": 2**30,
        }
    )
    assert figures["seconds_per_save"] == {"sync": 3, "async": 1}
    assert figures["ratio"] == 3
    row = shown({"strategies": {"ddp": figures}}).splitlines()[1].split()
    assert row == ["ddp", "3.000", "1.000", "3.00", "2.000", "0.500", "1,024", "MiB"]


def test_a_cost_below_the_noise_is_the_time_for_which_training_stood_still() -> None:
    figures = summary(
        {
            "seconds": {"none": [10], "sync": [13], "async": [9.9]},
            "stall_seconds": {"sync": [2], "async": [0.5]},
            "checkpoint_bytes": 2**30,
        }
    )
    assert figures["seconds_per_save"] == {"sync": 3, "async": 0.5}


def test_a_failed_run_gives_no_figures() -> None:
    failed = summary({"error": "no space"})
    assert failed == {"error": "no space", "ratio": None}
    assert "failed:\nno space" in shown({"strategies": {"ddp": failed}})


@pytest.mark.wide
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--model", "gpt2_tiny", "--strategy", "ddp", "--saves", "2"]
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
    assert {way: len(each) for way, each in figures["seconds_of_stretches"].items()} == {
        "none": 2,
        "sync": 2,
        "async": 2,
    }
    assert figures["checkpoint_bytes"] > 2**20
    assert figures["stall_seconds"]["sync"] > 0
