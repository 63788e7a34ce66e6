"""The benchmark runs from end to end on a CPU, and its figures add up on paper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import STOCK, Figures, markdown, summary
from benchmarks.train_gpu import MODELS, VARIANTS, Plan, freeze, overrides
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import RunConfig

ROOT = Path(__file__).parents[2]
LAPTOP = Machine(cores=2)
ONE_H200 = Machine(compute_capabilities=(9.0,), cores=16)


def plan_on(here: Machine) -> Plan:
    return Plan(list(MODELS), list(VARIANTS), steps=50, warmup_steps=20, repeats=2, here=here)


@pytest.fixture
def kantaibert(tmp_path: Path) -> RunConfig:
    return freeze(plan_on(ONE_H200), "kantaibert", "single", tmp_path / "run")


def test_on_a_gpu_it_trains_the_real_model_in_bf16(kantaibert: RunConfig) -> None:
    assert (kantaibert.model.kind, kantaibert.launcher.device) == ("roberta", "cuda")
    assert kantaibert.precision.compute_dtype == "bf16"
    assert kantaibert.trainer.samples_per_pass * kantaibert.data.tokens_per_sample == 16384
    assert kantaibert.trainer.max_steps == 70


@pytest.mark.parametrize("here", [LAPTOP, ONE_H200], ids=["cpu", "gpu"])
@pytest.mark.parametrize("model", MODELS)
def test_stock_and_single_are_the_same_run(model: str, here: Machine) -> None:
    plan = plan_on(here)
    assert overrides(plan, model, STOCK) == overrides(plan, model, "single")


@pytest.mark.parametrize("here", [LAPTOP, ONE_H200], ids=["cpu", "gpu"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_run_composes(model: str, variant: str, here: Machine, tmp_path: Path) -> None:
    config = freeze(plan_on(here), model, variant, tmp_path / "run")
    assert config.launcher.world_size == 1
    assert config.trainer.compile == (variant == "single_compile")


def one_run(tokens_per_second: float) -> Figures:
    return {
        "tokens_per_second": tokens_per_second,
        "peak_memory_bytes": 2**31,
        "losses": [7.0, 6.5],
        "matmul_parameters": 83_108_896,
        "device": "NVIDIA H200",
    }


def test_ratio_and_mfu_come_from_medians(kantaibert: RunConfig) -> None:
    runs = {
        STOCK: [one_run(100_000), one_run(90_000), one_run(1_000)],
        "single": [one_run(108_000), one_run(500_000), one_run(99_000)],
    }
    figures = summary(kantaibert, runs)
    assert figures["ratio"] == figures["variants"]["single"]["ratio"] == pytest.approx(1.2)
    flops = 6 * 83_108_896 + 12 * 6 * 768 * 512
    assert figures["variants"][STOCK]["mfu"] == pytest.approx(90_000 * flops / 989e12)


def test_a_failed_run_is_shown_and_leaves_the_others_their_figures(kantaibert: RunConfig) -> None:
    runs = {STOCK: [one_run(100)], "single": [one_run(150)], "zero2": [{"error": "no compiler"}]}
    page = markdown(
        {
            "date": "2026-01-31",
            "hardware": {"device": "NVIDIA H200", "cuda": "13.0", "cores": 16},
            "versions": {"torch": "2.11.0"},
            "steps": 50,
            "warmup_steps": 20,
            "repeats": 1,
            "peak_bf16_flops": 989e12,
            "models": {"kantaibert": summary(kantaibert, runs)},
            "ratio": 1.5,
        }
    )
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    assert ["", "single", "150", "0.0%", "1.500", "0.0%", "2.00 GiB", "6.5000", ""] in rows
    assert ["", "zero2", "failed", "", "", "", "", "", ""] in rows
    assert "zero2 failed:\n\n```\nno compiler\n```" in page
    assert "torch 2.11.0" in page


def ran(tmp_path: Path, *arguments: str) -> Figures:
    """Run the command without a GPU in sight; return what it wrote."""
    file = tmp_path / "figures.json"
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_gpu", *arguments, "--json", str(file)],
        cwd=ROOT,
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Overall ratio" in ended.stdout
    figures: Figures = json.loads(file.read_text())
    return figures


def assert_same_learning(figures: Figures) -> None:
    """Assert that stock and ours trained the same model on the same samples."""
    tokens = figures["sequence_length"]
    # A causal model leaves a sample's last position out of its loss; the Trainer counts it.
    share = (tokens - 1) / tokens if figures["objective"] == "clm" else 1.0
    stock: list[float] = figures["variants"][STOCK]["losses"]
    for variant in figures["variants"].values():
        if variant is not figures["variants"][STOCK]:
            expected = [share * loss for loss in variant["losses"]]
            tolerance: Any = {"abs": 5e-3} if share < 1 else {"abs": 1e-4}
            assert stock == pytest.approx(expected, **tolerance)


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--variant", "single", "--steps", "2", "--warmup-steps", "1"]
    results = ran(tmp_path, *arguments)

    assert results["hardware"]["device"].startswith("CPU")
    assert {"python", "torch", "transformers", "accelerate"} <= set(results["versions"])
    assert results["ratio"] > 0
    assert set(results["models"]) == set(MODELS)
    for figures in results["models"].values():
        assert figures["ratio"] > 0
        assert set(figures["variants"]) == {STOCK, "single"}
        for variant in figures["variants"].values():
            assert variant["tokens_per_second"] > 0
            assert variant["peak_memory_bytes"] > 2**20
            assert variant["mfu"] is None
            assert len(variant["losses"]) == 3
        assert_same_learning(figures)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_variant_runs_on_a_cpu(tmp_path: Path) -> None:
    for figures in ran(tmp_path, "--repeats", "2")["models"].values():
        assert set(figures["variants"]) == set(VARIANTS)
        assert all(variant["ratio"] > 0 for variant in figures["variants"].values())
        assert_same_learning(figures)
