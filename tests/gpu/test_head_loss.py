"""The loss in pieces is as exact on a GPU as on a CPU, repeats its bits and needs less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from shardwright.train.config import PrecisionConfig
from shardwright.train.model.head_loss import loss_and_right, summed_loss
from shardwright.train.model.loss_terms import IGNORED

POSITIONS, FEATURES, VOCABULARY = 1000, 128, 3001


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2), ("fp16", 2e-3)])
def test_loss_and_gradients_are_those_of_the_logits(
    device: str,
    dtype: str,
    tolerance: float,
    skip_where_lacking: Callable[[str, PrecisionConfig], None],
) -> None:
    if device == "cuda":
        skip_where_lacking(device, PrecisionConfig(compute_dtype=dtype))  # type: ignore[arg-type]
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, FEATURES, device=device).to(compute).requires_grad_()
    weight = torch.randn(VOCABULARY, FEATURES, device=device).div_(8).to(compute).requires_grad_()
    bias = torch.randn(VOCABULARY, device=device).to(compute).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (POSITIONS,), device=device)
    labels[::5] = IGNORED

    def plain() -> torch.Tensor:
        logits = linear(hidden, weight, bias).float()
        return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def fused() -> torch.Tensor:
        return summed_loss(hidden, weight, bias, labels)

    def measured(loss_of: Callable[[], torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        loss = loss_of()
        gradients = torch.autograd.grad(loss / 64, (hidden, weight, bias))
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return [loss.detach(), *gradients], peak

    expected, peak_of_plain = measured(plain)
    torch.use_deterministic_algorithms(True)
    try:
        (found, peak), (again, _) = measured(fused), measured(fused)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == compute
        assert (one - other).abs().max() <= tolerance * other.abs().max()
    assert peak <= peak_of_plain
    right = linear(hidden, weight, bias).argmax(-1).eq(labels).sum()
    assert abs(loss_and_right(hidden, weight, bias, labels)[1] - right) <= POSITIONS // 100
