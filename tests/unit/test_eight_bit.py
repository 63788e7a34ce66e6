"""8-bit moments go into a checkpoint as fp32 ones and come back without a loss."""

from __future__ import annotations

import pytest
import torch

from shardwright.train.optimizer import eight_bit

pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.optim.subclass_8bit import OptimState8bit


def moment(values: torch.Tensor, *, signed: bool) -> OptimState8bit:
    buffer = OptimState8bit.zeros(values.shape, signed=signed)
    return buffer.copy_(values)


def values_of(size: float) -> torch.Tensor:
    values = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) * size
    values[:3] = 0
    return values


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-13])
def test_what_was_dequantised_means_the_same_again(signed: bool, size: float) -> None:
    values = values_of(size) if signed else values_of(size).abs()
    held = moment(values, signed=signed)
    written = eight_bit.dequantised({"exp_avg": held})["exp_avg"]
    codes, scale = eight_bit.encoded(written, held.qmap, held.block_size)
    again = OptimState8bit(codes, scale, held.qmap, signed)
    assert torch.equal(again.dequantize(), written)


def test_torchao_alone_would_lose_some() -> None:
    written = moment(values_of(1.0), signed=True).dequantize()
    assert not torch.equal(moment(written, signed=True).dequantize(), written), "no need any more"


def test_values_of_another_origin_are_quantised_as_torchao_does() -> None:
    values = values_of(1.0)
    held = moment(values, signed=True)
    codes, scale = eight_bit.encoded(values, held.qmap, held.block_size)
    assert torch.equal(codes, held.codes)
    assert torch.equal(scale, held.scale)


def test_a_tensor_says_to_be_in_fp32_and_shares_its_bytes() -> None:
    held = OptimState8bit.zeros((4096,), dtype=torch.bfloat16)
    shown = eight_bit.appearing_in_fp32({"state": {"exp_avg": held}})["state"]["exp_avg"]
    assert (held.dtype, shown.dtype) == (torch.bfloat16, torch.float32)
    assert shown.codes.data_ptr() == held.codes.data_ptr()
