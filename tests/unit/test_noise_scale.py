"""The gradient noise scale of gradients whose mean and covariance are known, and its refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shardwright.train.config import RankLayout, RunConfig
from shardwright.train.loop.callbacks.metrics import _of_noise
from shardwright.train.loop.noise_scale import Estimate, NoiseScale, estimated

DIMENSIONS, PARTS, PART = 400, 4, 8
TRUE_SQUARE, VARIANCE = 4.0, 100.0
"""Of the true gradient's norm, and the trace of a sample's covariance: a noise scale of 25."""


def gradients(count: int, seed: int) -> torch.Tensor:
    """Return the gradients of that many samples."""
    torch.manual_seed(seed)
    mean = torch.full((DIMENSIONS,), (TRUE_SQUARE / DIMENSIONS) ** 0.5)
    return mean + torch.randn(count, DIMENSIONS) * (VARIANCE / DIMENSIONS) ** 0.5


def on_one_rank(tree: dict[str, Any]) -> NoiseScale:
    tree["strategy"] = {"kind": "single"}
    tree["launcher"]["nproc_per_node"] = 1
    tree["trainer"] |= {"global_batch_size": PARTS * PART, "micro_batch_size": PART}
    training: Any = SimpleNamespace(
        config=RunConfig(**tree),
        layout=RankLayout(),
        args=SimpleNamespace(world_size=1, device=torch.device("cpu")),
    )
    return NoiseScale(training)


def test_two_norms_give_the_appendixs_estimates() -> None:
    """Of batches of 2 and 6 samples, by the formulas as they are printed."""
    small, large = 7.0, 3.0
    square = (6 * large - 2 * small) / (6 - 2)
    variance = (small - large) / (1 / 2 - 1 / 6)
    found = estimated(small, large, small * 6, large * 6, parts=3)
    assert found == pytest.approx(Estimate(square, variance))
    assert found.scale == pytest.approx(variance / square)


def test_made_up_gradients_have_the_noise_scale_that_they_were_made_with(tiny_tree: Any) -> None:
    measured = on_one_rank(tiny_tree("clm"))
    parameter = nn.Parameter(torch.zeros(DIMENSIONS))
    for step in range(300):
        whole = gradients(PARTS * PART, step)
        # As a training has them: sums over samples, divided by those of the whole step.
        parameter.grad = whole[:PART].sum(0) / len(whole)
        measured.micro_batch_ends([parameter])
        measured.step_ends(whole.mean(0).norm(), len(whole))
    found = measured.taken()
    assert found is not None
    assert found.gradient_square == pytest.approx(TRUE_SQUARE, rel=0.05)
    assert found.variance == pytest.approx(VARIANCE, rel=0.05)
    assert found.scale == pytest.approx(VARIANCE / TRUE_SQUARE, rel=0.1)
    assert measured.taken() is None, "what is logged begins anew"


def test_a_step_that_is_not_finite_counts_for_nothing(tiny_tree: Any) -> None:
    measured = on_one_rank(tiny_tree("clm"))
    measured.add_local(torch.tensor([3.0]))
    measured.step_ends(2.0, 10)
    measured.add_local(torch.tensor([torch.inf]))
    measured.step_ends(torch.inf, 10)
    assert measured.taken() == estimated(4.5, 2.0, 45.0, 20.0, parts=PARTS)


def test_where_noise_hides_the_gradient_no_scale_is_logged() -> None:
    assert _of_noise(Estimate(-1.0, 5.0)) == {
        "gradient_square_estimate": -1.0,
        "gradient_variance_estimate": 5.0,
    }
    assert _of_noise(Estimate(2.0, 5.0))["gradient_noise_scale"] == 2.5
    assert _of_noise(None) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"strategy": {"kind": "zero", "stage": 1}},
            "under strategy=zero DeepSpeed has reduced it within its backward pass; choose "
            "strategy=ddp, fsdp or single, or set it to false",
        ),
        (
            {"strategy": {"kind": "fsdp", "reduce_each_micro_batch": False}},
            "strategy.reduce_each_micro_batch=false leaves where FSDP alone finds it",
        ),
        (
            {"strategy": {"kind": "fsdp"}, "trainer": {"global_batch_size": 8}},
            "compares a step's first micro-batch with all of them, but there is one "
            "(trainer.micro_batch_size=4); set trainer.micro_batch_size to a smaller one",
        ),
        (
            {"strategy": {"kind": "fsdp", "replicas": 2}, "launcher": {"nproc_per_node": 4}},
            "strategy.replicas=2 add theirs up after the last one alone",
        ),
        ({"launcher": {"nproc_per_node": 1}}, "under strategy=ddp, but there is one; start two"),
        (
            {"precision": {"compute_dtype": "fp16"}, "launcher": {"device": "cuda"}},
            "precision.compute_dtype=fp16 scales them by a factor that changes",
        ),
    ],
)
def test_what_has_no_smaller_batch_is_refused(
    changes: dict[str, Any], said: str, tiny_tree: Any
) -> None:
    tree = tiny_tree("clm")
    tree["trainer"]["debug"] = {"noise_scale": True}
    for section, values in changes.items():
        tree[section] = values if section == "strategy" else tree[section] | values
    with pytest.raises(ValueError, match="RunConfig") as refused:
        RunConfig(**tree)
    assert f"trainer.debug.noise_scale=true {said}" in str(refused.value) or said in str(
        refused.value
    )
