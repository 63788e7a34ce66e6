"""Strategies, precisions and offload on one GPU; on a CPU the same tests run in what it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardwright.train.config import load
from tests.distributed.jobs import whole_run
from tests.distributed.pool import Ranks
from tests.fixtures import Freeze, TreeOf
from tests.gpu.jobs import observed_training, state_devices

STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "ddp": {"kind": "ddp"},
    "zero2": {"kind": "zero", "stage": 2},
    "zero3": {"kind": "zero", "stage": 3},
    "fsdp": {"kind": "fsdp"},
}
OFFLOADED: dict[str, dict[str, Any]] = {
    "zero2_offload": {"kind": "zero", "stage": 2, "offload_optimizer": "cpu"},
    "zero3_offload": {
        "kind": "zero",
        "stage": 3,
        "offload_optimizer": "cpu",
        "offload_parameters": "cpu",
    },
    "fsdp_offload": {"kind": "fsdp", "offload": True},
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
    "fp8": {"compute_dtype": "bf16", "fp8_recipe": "tensorwise"},
    "fp8_rowwise": {"compute_dtype": "bf16", "fp8_recipe": "rowwise"},
    "fp8_rowwise_with_gw_hp": {"compute_dtype": "bf16", "fp8_recipe": "rowwise_with_gw_hp"},
}
# The blocks of GPT-2 have no linear layer to convert.
LLAMA = {
    "kind": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA_LINEAR_LAYERS = 2 * 7
# How far a loss near 6 may lie from fp32's on a CPU, by the bits of its products: 24, 11, 8, 11, 4.
TOLERANCES = {"fp32": 2e-4, "tf32": 2e-3, "bf16": 5e-3, "fp16": 2e-3, "fp8": 1e-2}
HEAD_DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def on_cpu(strategy: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a case that shows on a CPU that these tests run; one of each suffices."""
    often = strategy in ("zero3", "zero3_offload")
    return [pytest.mark.distributed] + ([] if often else [pytest.mark.slow])


CASES = [
    *(pytest.param("cpu", "bf16", strategy, marks=on_cpu(strategy)) for strategy in STRATEGIES),
    *(
        pytest.param("cuda", precision, strategy, marks=pytest.mark.gpu)
        for precision in ("fp32", "tf32", "bf16", "fp16")
        for strategy in STRATEGIES
    ),
]
OFFLOADED_CASES = [
    pytest.param(
        device,
        precision,
        strategy,
        marks=on_cpu(strategy) if device == "cpu" else [pytest.mark.gpu],
    )
    for device in ("cpu", "cuda")
    for precision in ("fp32", "bf16")
    for strategy in OFFLOADED
    # A CPU has these in test_parity.py.
    if device == "cuda" or precision == "bf16"
]
FP8_CASES = [
    ("fp8", "single"),
    ("fp8", "ddp"),
    ("fp8", "zero2"),
    ("fp8", "fsdp"),
    ("fp8_rowwise", "ddp"),
    ("fp8_rowwise", "fsdp"),
    ("fp8_rowwise_with_gw_hp", "ddp"),
    ("fp8_rowwise_with_gw_hp", "fsdp"),
]

RankOn = Callable[[str], Ranks]
Run = Callable[..., Path]


@pytest.fixture
def new_run(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    skip_where_lacking: Callable[..., None],
) -> Run:
    """Return a function that freezes a run of one rank, or skips the test where it cannot run."""

    def freeze(
        device: str, precision: str, strategy: str, max_steps: int, **sections: dict[str, Any]
    ) -> Path:
        tree = tiny_tree("clm")
        tree["strategy"] = {**STRATEGIES, **OFFLOADED}[strategy]
        tree["precision"] = PRECISIONS[precision]
        tree["trainer"] |= {"max_steps": max_steps, "compile": False}
        tree["launcher"] |= {"device": device, "nproc_per_node": 1}
        for name, values in sections.items():
            tree[name] = values if name == "model" else {**tree[name], **values}
        run_dir = frozen_run(tree)
        skip_where_lacking(device, load(run_dir).precision)
        return run_dir

    return freeze


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir) if "loss" in line]


def precision_line(precision: str, strategy: str) -> str:
    """Return what the terminal is to say of a run on one rank."""
    compute = {
        "fp32": "fp32 compute",
        "tf32": "fp32 compute with TF32 products",
        "bf16": "bf16 compute",
        "fp16": "fp16 compute",
    }
    if (recipe := PRECISIONS[precision].get("fp8_recipe")) is None:
        said = compute[precision]
    else:
        said = f"bf16 compute with {recipe} fp8 products in {LLAMA_LINEAR_LAYERS} linear layers"
    parts = [
        said,
        *([] if strategy == "single" else ["fp32 reduction"]),
        "fp32 master weights",
        "fp32 moments",
        *([f"loss scale {INITIAL_LOSS_SCALE:g}"] if precision == "fp16" else []),
    ]
    return f"{strategy.removesuffix('_offload')} on 1 rank: {', '.join(parts)}"


@pytest.fixture(scope="session")
def reference() -> dict[str, list[float]]:
    """Return fp32's losses on a CPU for each model, filled in by the tests that need them."""
    return {}


@pytest.mark.parametrize(("device", "precision", "strategy"), [*CASES, *OFFLOADED_CASES])
def test_it_learns_what_fp32_learns_on_a_cpu_and_final_loads(
    device: str,
    precision: str,
    strategy: str,
    new_run: Run,
    rank_on: RankOn,
    reference: dict[str, list[float]],
) -> None:
    run_dir = new_run(device, precision, strategy, max_steps=20)
    if "gpt2" not in reference:
        alone = new_run("cpu", "fp32", "single", max_steps=20)
        rank_on("cpu")(whole_run, alone)
        reference["gpt2"] = losses(alone)
    expected = reference["gpt2"]

    (console,) = rank_on(device)(whole_run, run_dir)

    assert len(expected) == 20
    assert expected[-1] < expected[0] - 0.1, "nothing was learned"
    assert losses(run_dir) == pytest.approx(expected, abs=TOLERANCES[precision])
    # Printed once the live engine is what the config asks for.
    assert console.splitlines().count(precision_line(precision, strategy)) == 1, console

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
    assert written == pytest.approx(seen["peak_memory_bytes"], rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "strategy"), FP8_CASES)
def test_fp8_learns_what_fp32_learns_on_a_cpu(
    precision: str,
    strategy: str,
    new_run: Run,
    rank_on: RankOn,
    reference: dict[str, list[float]],
) -> None:
    run_dir = new_run("cuda", precision, strategy, max_steps=20, model=LLAMA)
    if "llama" not in reference:
        alone = new_run("cpu", "fp32", "single", max_steps=20, model=LLAMA)
        rank_on("cpu")(whole_run, alone)
        reference["llama"] = losses(alone)

    (console,) = rank_on("cuda")(whole_run, run_dir)

    assert losses(run_dir) == pytest.approx(reference["llama"], abs=TOLERANCES["fp8"])
    assert console.splitlines().count(precision_line(precision, strategy)) == 1, console
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_calls_the_gpus_fp8_product(compiled: bool, new_run: Run, rank_on: RankOn) -> None:
    trainer = {"compile": compiled, "checkpoint_activations_every_blocks": 2}
    run_dir = new_run("cuda", "fp8", "fsdp", max_steps=6, model=LLAMA, trainer=trainer)
    (seen,) = rank_on("cuda")(observed_training, run_dir)
    # Compiled graphs call it by another way than operators that the profiler names alike.
    assert any("_scaled_mm" in name for name in seen["operators"]), seen["operators"]


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", OFFLOADED)
def test_offloaded_state_is_in_host_memory(strategy: str, new_run: Run, rank_on: RankOn) -> None:
    run_dir = new_run("cuda", "bf16", strategy, max_steps=2)
    (devices,) = rank_on("cuda")(state_devices, run_dir)
    assert devices == {"cpu"}
    facts = json.loads((run_dir / "engine.json").read_text())
    if strategy == "fsdp_offload":
        assert (facts["offloaded"], facts["pinned"]) == (True, True)
    else:
        assert facts["offload_optimizer"] == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_activations_wait_in_host_memory(strategy: str, new_run: Run, rank_on: RankOn) -> None:
    def train(**trainer: Any) -> tuple[list[float], int]:
        # Activations take several times the memory of weights, gradients and moments.
        sizes = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 1024}
        run_dir = new_run(
            "cuda",
            "bf16",
            strategy,
            max_steps=3,
            # Attention that draws, which selective keeps and does not run again.
            model={**LLAMA, **sizes, "max_position_embeddings": 256, "attention_dropout": 0.1},
            data={"sequence_length": 256},
            trainer={"micro_batch_size": 16, **trainer},
        )
        (seen,) = rank_on("cuda")(observed_training, run_dir)
        return losses(run_dir), seen["peak_memory_bytes"]

    kept, kept_peak = train()
    recomputed, recomputed_peak = train(checkpoint_activations_every_blocks=1)
    offloaded, offloaded_peak = train(
        checkpoint_activations_every_blocks=1, offload_activations=True
    )
    selective, selective_peak = train(checkpoint_activations_every_blocks=1, recompute="selective")
    assert recomputed == pytest.approx(kept, abs=1e-3)
    assert selective == pytest.approx(kept, abs=1e-3)
    assert offloaded == pytest.approx(kept, abs=1e-3)
    assert recomputed_peak < 0.7 * kept_peak
    assert offloaded_peak <= recomputed_peak
    assert recomputed_peak < selective_peak < kept_peak
