"""Quantised layers as a plan traces them: unpacked for each product, and let go of after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardwright.train.config import RunConfig
from shardwright.train.config.model import NOT_QUANTIZED, quantization_of
from shardwright.train.model import quantised
from shardwright.train.plan.facts import Packed


def packed_sizes(model: PreTrainedModel, config: RunConfig) -> dict[str, Packed]:
    """Return the bytes of each parameter of a model's quantised layers, before it has any values.

    Their biases are in the dtype of compute.
    """
    bits = quantization_of(config.model)
    if bits == NOT_QUANTIZED:
        return {}
    sizes: dict[str, Packed] = {}
    for name, layer in quantised.to_be_quantised(model).items():
        weight: Any = layer.weight
        outputs, inputs = tuple(weight.shape)
        if isinstance(layer, Conv1D):
            outputs, inputs = inputs, outputs
        (rows, columns), dtype = quantised.codes(inputs, outputs, bits)
        scales = quantised.scales_bytes(inputs, outputs, bits)
        sizes[f"{name}.weight"] = Packed(rows * columns * dtype.itemsize, rows, scales)
        bias: Any = layer.bias
        if bias is not None:
            size = bias.numel() * config.precision.computes_in.size_bytes
            sizes[f"{name}.bias"] = Packed(size, bias.numel())
    return sizes


def pack(model: PreTrainedModel, config: RunConfig) -> None:
    """Have a model that is to be traced compute as its quantised layers do."""
    bits = quantization_of(config.model)
    if bits == NOT_QUANTIZED:
        return
    compute = quantised.compute_dtype(config)
    for name, layer in quantised.to_be_quantised(model).items():
        model.set_submodule(name, _Packed(layer, bits, compute))


class _Packed(nn.Module):
    """Takes as much as a layer of bitsandbytes (0.50, autograd/_functions.py)."""

    def __init__(self, layer: Any, bits: str, compute: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._is_transposed = isinstance(layer, Conv1D)
        self._bits, self._compute = bits, compute

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        shape = tuple(self.weight.shape)
        shape = shape[::-1] if self._is_transposed else shape
        bias = None if self.bias is None else self.bias.to(self._compute)
        found: torch.Tensor = _Product.apply(given.to(self._compute), bias, shape, self._bits)
        return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, given: torch.Tensor, bias: Any, shape: tuple[int, int], bits: str
    ) -> torch.Tensor:
        ctx.shape, ctx.dtype = shape, given.dtype
        if bits == "8bit":
            # What goes in is kept, where blocks are computed again too: not by torch's own means,
            # of which that would let go. On a GPU the product is of whole numbers.
            ctx.given = given
            codes = torch.empty_like(given, dtype=torch.int8)
            sums = given.new_empty((*given.shape[:-1], shape[0]), dtype=torch.int32)
            del codes, sums
        return functional.linear(given, given.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.to(ctx.dtype)
        return gradient @ gradient.new_empty(ctx.shape), None, None, None
