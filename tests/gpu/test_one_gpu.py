"""Every strategy in every precision on one GPU; on a CPU the same tests run in what it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.jobs import whole_run
from tests.distributed.pool import Ranks
from tests.gpu.jobs import observed_training
from train.config import load

STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "ddp": {"kind": "ddp"},
    "zero2": {"kind": "zero", "stage": 2},
    "zero3": {"kind": "zero", "stage": 3},
    "fsdp": {"kind": "fsdp"},
}
INITIAL_LOSS_SCALE = 4096.0
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"compute_dtype": "fp32"},
    "tf32": {"compute_dtype": "fp32", "allow_tf32": True},
    "bf16": {"compute_dtype": "bf16"},
    "fp16": {
        "compute_dtype": "fp16",
        # Low enough that no step overflows and is skipped, which would shift the curve.
        "initial_loss_scale": INITIAL_LOSS_SCALE,
        "loss_scale_growth_steps": 5,
    },
}
# How far a loss near 6 may lie from fp32's on a CPU, by the bits of its products: 24, 11, 8, 11.
TOLERANCES = {"fp32": 2e-4, "tf32": 2e-3, "bf16": 5e-3, "fp16": 2e-3}
HEAD_DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}

CASES = [
    *(
        pytest.param("cpu", "bf16", strategy, marks=pytest.mark.distributed)
        for strategy in STRATEGIES
    ),
    *(
        pytest.param("cuda", precision, strategy, marks=pytest.mark.gpu)
        for precision in PRECISIONS
        for strategy in STRATEGIES
    ),
]

RankOn = Callable[[str], Ranks]
Run = Callable[..., Path]


@pytest.fixture
def new_run(
    tiny_tree: Callable[[str], dict[str, Any]],
    frozen_run: Callable[[dict[str, Any]], Path],
    skip_where_lacking: Callable[..., None],
) -> Run:
    """Return a function that freezes a run of one rank, or skips the test where it cannot run."""

    def freeze(device: str, precision: str, strategy: str, max_steps: int) -> Path:
        tree = tiny_tree("clm")
        tree["strategy"] = STRATEGIES[strategy]
        tree["precision"] = PRECISIONS[precision]
        tree["trainer"]["max_steps"] = max_steps
        tree["launcher"] |= {"device": device, "nproc_per_node": 1}
        run_dir = frozen_run(tree)
        skip_where_lacking(device, load(run_dir).precision)
        return run_dir

    return freeze


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir) if "loss" in line]


@pytest.fixture(scope="session")
def reference() -> list[float]:
    """Return fp32's losses on a CPU, filled in by the first test that needs them."""
    return []


@pytest.mark.parametrize(("device", "precision", "strategy"), CASES)
def test_it_learns_what_fp32_learns_on_a_cpu_and_final_loads(
    device: str,
    precision: str,
    strategy: str,
    new_run: Run,
    rank_on: RankOn,
    reference: list[float],
) -> None:
    run_dir = new_run(device, precision, strategy, max_steps=20)
    if not reference:
        alone = new_run("cpu", "fp32", "single", max_steps=20)
        rank_on("cpu")(whole_run, alone)
        reference.extend(losses(alone))

    rank_on(device)(whole_run, run_dir)

    assert len(reference) == 20
    assert reference[-1] < reference[0] - 0.1, "nothing was learned"
    assert losses(run_dir) == pytest.approx(reference, abs=TOLERANCES[precision])

    model = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize(("device", "precision", "strategy"), CASES)
def test_device_dtype_fused_optimizer_loss_scale_and_peak_are_real(
    device: str, precision: str, strategy: str, new_run: Run, rank_on: RankOn
) -> None:
    run_dir = new_run(device, precision, strategy, max_steps=12)

    (seen,) = rank_on(device)(observed_training, run_dir)

    assert seen["parameter_devices"] == {device}
    assert seen["head_dtypes"] == {HEAD_DTYPES[precision]}
    if device == "cuda":
        assert seen["allow_tf32"] is (precision == "tf32")
    assert "aten::_fused_adamw_" in seen["operators"]
    assert "aten::_foreach_addcdiv_" not in seen["operators"]
    # No step overflows, so the factor doubles after every fifth.
    assert seen["loss_scale"] == (4 * INITIAL_LOSS_SCALE if precision == "fp16" else None)
    written = lines(run_dir)[-1]["peak_memory_bytes"]
    assert 0.9 * seen["peak_memory_bytes"] <= written <= seen["peak_memory_bytes"]
