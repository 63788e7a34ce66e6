"""A checkpoint reads as the very masters and moments that the engine held when it wrote it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from shardwright.train.checkpoint.read import portable
from tests.distributed.jobs import held, trained
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed

ZERO1, ZERO2 = {"kind": "zero", "stage": 1}, {"kind": "zero", "stage": 2}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "fsdp_hybrid": {"kind": "fsdp", "replicas": 2},
    "zero0": {"kind": "zero", "stage": 0},
    "zero1": ZERO1,
    "zero1_round_robin": {**ZERO1, "round_robin_gradients": True},
    "zero2": ZERO2,
    "zero2_round_robin": {**ZERO2, "round_robin_gradients": True},
    "zero2_offload": {**ZERO2, "offload_optimizer": "cpu"},
    # Many sub-groups, all parameters sharded, the small ones too.
    "zero3": {
        "kind": "zero",
        "stage": 3,
        "sub_group_elements": 3000,
        "persistence_elements": 0,
    },
    "zero3_offload": {"kind": "zero", "stage": 3, "offload_optimizer": "cpu"},
}
STEPS = 2


@pytest.mark.parametrize(
    ("strategy", "dtype", "world_size"),
    [
        ("ddp", "fp32", 1),
        pytest.param("ddp", "bf16", 2, marks=pytest.mark.slow),
        ("fsdp", "fp32", 4),
        pytest.param("fsdp", "bf16", 2, marks=pytest.mark.slow),
        ("fsdp_hybrid", "fp32", 4),
        pytest.param("zero0", "fp32", 2, marks=pytest.mark.slow),
        ("zero0", "bf16", 2),
        pytest.param("zero1", "fp32", 4, marks=pytest.mark.slow),
        ("zero1", "bf16", 2),
        ("zero1_round_robin", "fp32", 4),
        pytest.param("zero1_round_robin", "bf16", 2, marks=pytest.mark.slow),
        pytest.param("zero2", "fp32", 1, marks=pytest.mark.slow),
        pytest.param("zero2", "bf16", 4, marks=pytest.mark.slow),
        ("zero2_round_robin", "fp32", 2),
        ("zero2_round_robin", "bf16", 4),
        pytest.param("zero2_offload", "bf16", 2, marks=pytest.mark.slow),
        ("zero3", "fp32", 4),
        pytest.param("zero3", "bf16", 1, marks=pytest.mark.slow),
        ("zero3", "bf16", 2),
        pytest.param("zero3_offload", "bf16", 4, marks=pytest.mark.slow),
    ],
)
def test_what_is_read_is_what_the_engine_held(
    strategy: str,
    dtype: str,
    world_size: int,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    # Sizes that neither 2 nor 4 divide, so that rows, parameters and partitions need padding.
    tree["model"] |= {"vocab_size": 389, "hidden_size": 34, "intermediate_size": 67}
    tree["strategy"], tree["precision"] = STRATEGIES[strategy], {"compute_dtype": dtype}
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": STEPS, "eval_max_samples": 4}
    tree["launcher"]["nproc_per_node"] = world_size
    run_dir = frozen_run(tree)
    engine = ranks(world_size)(trained, run_dir, held)[0]

    state = portable.read(run_dir / "checkpoints" / f"checkpoint-{STEPS}")
    assert set(engine) <= set(state.weights), "a tied weight may stand under its other names too"
    assert set(engine) <= set(state.moments)
    draw = random.Random(strategy)
    for name, tensors in engine.items():
        found = {"weight": state.weights[name], **state.moments[name]}
        assert found.keys() == tensors.keys() == {"weight", "exp_avg", "exp_avg_sq"}
        assert state.scalars[name]["step"] == STEPS
        for kind, array in tensors.items():
            expected, whole = torch.from_numpy(array), found[kind].whole()
            assert whole.dtype == torch.float32
            assert torch.equal(whole, expected), f"{kind} of {name}"
            assert whole.any() or not expected.any()
            start = draw.randrange(whole.numel())
            stop = draw.randrange(start, whole.numel() + 1)
            assert torch.equal(found[kind].read(start, stop), whole.flatten()[start:stop])
