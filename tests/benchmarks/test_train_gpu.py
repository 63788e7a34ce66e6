"""The benchmark runs from end to end on a CPU, and its figures add up on paper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.report import PEERS, STOCK, TUNED, Figures, markdown, summary
from benchmarks.train_gpu import (
    MODELS,
    VARIANTS,
    Plan,
    freeze,
    overrides,
    run_within,
    variants_of,
)
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import RunConfig, ScratchModel

ROOT = Path(__file__).parents[2]
LAPTOP = Machine(cores=2)
ONE_H200 = Machine(compute_capabilities=(9.0,), cores=16)


HEAD = "objective.head_on_labels_only=false"


def plan_on(here: Machine) -> Plan:
    return Plan(list(MODELS), list(VARIANTS), [], steps=50, warmup_steps=20, repeats=2, here=here)


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
def test_the_peers_and_single_are_the_same_run(model: str, here: Machine) -> None:
    plan = plan_on(here)
    single = overrides(plan, model, "single")
    assert [overrides(plan, model, peer) for peer in PEERS] == [single, single]


def test_every_run_composes_on_an_h200(tmp_path: Path) -> None:
    plan = plan_on(ONE_H200)
    for model, setup in MODELS.items():
        for variant in variants_of(plan, model):
            config = freeze(plan, model, variant, tmp_path / f"{model}-{variant}")
            assert config.launcher.world_size == 1
            assert config.data.tokens_per_sample == setup.sequence_length
            assert (variant == "single_eager") <= (config.trainer.compile is False)


def test_every_model_has_one_that_stands_in_for_it_on_a_cpu(tmp_path: Path) -> None:
    plan = plan_on(LAPTOP)
    for model in MODELS:
        config = freeze(plan, model, "single", tmp_path / model)
        assert config.launcher.device == "cpu"


def test_the_sizes_are_those_that_are_called(tmp_path: Path) -> None:
    sizes = {"llama_1.3b": 1.3e9, "llama_8b": 8e9, "llama_7b_offloaded": 6.7e9}
    for model, parameters in sizes.items():
        config = freeze(plan_on(ONE_H200), model, "fsdp", tmp_path / model)
        assert isinstance(config.model, ScratchModel)
        assert config.model.parameters == pytest.approx(parameters, rel=0.03)


def test_a_setting_is_a_row_beside_the_run_that_is_like_for_like(tmp_path: Path) -> None:
    plan = replace(plan_on(LAPTOP), variants=["single"], without=[HEAD])
    assert variants_of(plan, "kantaibert") == [STOCK, "single", HEAD]
    assert overrides(plan, "kantaibert", HEAD) == [
        *overrides(plan, "kantaibert", "single"),
        HEAD,
    ]


def test_a_run_that_hangs_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '600']).wait()"
    log = tmp_path / "log"
    problem = run_within([sys.executable, "-c", code], dict(os.environ), log, limit_seconds=1)
    assert problem == "killed after 1 s"


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


def test_the_peer_of_a_model_may_be_another_run_of_it(kantaibert: RunConfig) -> None:
    runs = {"fsdp": [one_run(100)], "zero2_offload": [one_run(60)]}
    figures = summary(kantaibert, runs, peer="fsdp")
    assert (figures["compared"], figures["ratio"]) == ("zero2_offload", pytest.approx(0.6))
    tuned = summary(kantaibert, {STOCK: [one_run(9)], TUNED: [one_run(20)], "single": [one_run(5)]})
    assert tuned["variants"]["single"]["ratio_to_tuned"] == pytest.approx(0.25)


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
        timeout=2400,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Overall ratio" in ended.stdout
    figures: Figures = json.loads(file.read_text())
    return figures


def assert_same_learning(figures: Figures) -> None:
    """Assert that stock and ours trained the same model on the same samples."""
    tokens = figures["sequence_length"]
    # A causal model leaves a sample's last position out of its loss. The Trainer counts it where
    # the model's class is not called ...ForCausalLM (transformers 5.23, _loss_shifts_labels).
    share = (tokens - 1) / tokens if figures["model_kind"] == "gpt2" else 1.0
    peers = [figures["variants"][name] for name in PEERS if name in figures["variants"]]
    stock: list[float] = peers[0]["losses"]
    for variant in figures["variants"].values():
        if not any(variant is peer for peer in peers):
            expected = [share * loss for loss in variant["losses"]]
            tolerance = 5e-3 if figures["objective"] == "clm" else 1e-4
            assert stock == pytest.approx(expected, abs=tolerance)


@pytest.mark.wide
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--variant", "single", "--steps", "2", "--warmup-steps", "1"]
    arguments += ["--model", "kantaibert", "gpt2_small"]
    results = ran(tmp_path, *arguments)

    assert results["hardware"]["device"].startswith("CPU")
    assert {"python", "torch", "transformers", "accelerate"} <= set(results["versions"])
    assert results["ratio"] > 0
    assert set(results["models"]) == {"kantaibert", "gpt2_small"}
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
@pytest.mark.timeout(2400)
def test_every_variant_runs_on_a_cpu(tmp_path: Path) -> None:
    models = [model for model in MODELS if "offload" not in model]  # what a CPU has no use for
    results = ran(tmp_path, "--repeats", "2", "--steps", "2", "--model", *models)
    for model, figures in results["models"].items():
        assert set(figures["variants"]) == set(MODELS[model].variants)
        assert all(variant["ratio"] > 0 for variant in figures["variants"].values())
        assert_same_learning(figures)
