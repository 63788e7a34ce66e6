"""The benchmark of recovery: its checkpoints are the engines' own, and its figures add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import engine_checkpoints
from benchmarks.fabricated import write_zero
from benchmarks.recover import DEEPSPEED, OURS, differences, model_config, shown, summary
from tests.fixtures import RanksOf

ROOT = Path(__file__).parents[2]


def layout(value: Any) -> Any:
    """Return a tree with each tensor's dtype, shape and storage, and each value's kind."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return {key: layout(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [layout(each) for each in value]
    if type(value).__name__ == "fragment_address":
        return value.start, value.numel
    return type(value).__name__


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_fabricated_is_laid_out_as_the_engine_does(
    stage: int, ranks: RanksOf, tmp_path: Path
) -> None:
    # Odd sizes, so that the last rank's part is padded.
    config = GPT2Config(
        n_embd=33,
        n_head=3,
        n_layer=1,
        vocab_size=97,
        n_positions=31,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path / "config")
    real, ours = tmp_path / "real", tmp_path / "ours"
    ranks(2)(engine_checkpoints.write, f"zero{stage}", str(tmp_path / "config"), str(real))
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    write_zero(stage, model, ours)

    assert (ours / "latest").read_text() == (real / "latest").read_text()
    files = sorted(path.relative_to(real) for path in real.rglob("*.pt"))
    assert files == sorted(path.relative_to(ours) for path in ours.rglob("*.pt"))
    for file in files:
        trees = [torch.load(place / file, weights_only=False) for place in (real, ours)]
        assert layout(trees[1]) == layout(trees[0]), file


def test_presets_are_as_large_as_they_are_called() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(model_config("gpt2_xl"))
    assert 1.5e9 < sum(parameter.numel() for parameter in model.parameters()) < 1.7e9


def figures(seconds: float, peak: int) -> dict[str, Any]:
    return {"seconds": seconds, "cpu_seconds": seconds / 2, "peak_memory_bytes": peak}


def test_ratios_are_the_peers_figures_over_ours() -> None:
    runs = {
        OURS: [figures(2.0, 300), figures(9.0, 320), figures(3.0, 310)],
        DEEPSPEED: [figures(6.0, 600), figures(5.0, 620), figures(7.0, 640)],
    }
    found = summary(runs, {OURS: 210, DEEPSPEED: 120})
    assert found["programs"][OURS]["seconds"] == 3.0
    assert (found["ratio"], found["ratio_peak"], found["ratio_above_imports"]) == (2.0, 2.0, 5.0)
    rows = shown({"checkpoints": {"zero2": found}}).splitlines()
    assert rows[1].split()[:3] == ["zero2", "shardwright", "3.00"]
    assert rows[1].endswith("2.00, 2.00, 2.00, 5.00")


def test_a_program_that_fails_has_no_ratio() -> None:
    found = summary({OURS: [figures(2.0, 300)], DEEPSPEED: [{"error": "no space"}]}, {OURS: 210})
    assert (found["ratio"], found["ratio_peak"]) == (None, None)
    assert "failed:\nno space" in shown({"checkpoints": {"zero3": found}})


def test_tensors_that_differ_are_named(tmp_path: Path) -> None:
    for name, tensors in {
        "ours": {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1)},
        "peer": {"a": torch.ones(3), "b": torch.ones(2) + 1e-7, "d": torch.ones(1)},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert differences(tmp_path / "ours", tmp_path / "peer") == ["c", "d", "b"]


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--model", "gpt2_tiny", "--repeats", "1", "--directory", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.recover", *arguments, "--json", str(file)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(file.read_text())
    assert results["ratio"] > 0
    for kind in ("zero2", "zero3", "fsdp"):
        found = results["checkpoints"][kind]
        assert (found["written_by"], found["different"]) == ("engine", [])
        for values in found["programs"].values():
            assert values["peak_memory_bytes"] > values["imports_bytes"] > 2**26
