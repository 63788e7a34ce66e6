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
from shardwright.train.strategy.dtypes import TORCH_DTYPES


def packed_sizes(model: PreTrainedModel, config: RunConfig) -> dict[str, int]:
    """Return the bytes of each parameter of a model's quantised layers, before it has any values.

    Their biases are in the dtype of compute.
    """
    bits = quantization_of(config.model)
    if bits == NOT_QUANTIZED:
        return {}
    sizes: dict[str, int] = {}
    for name, layer in quantised.to_be_quantised(model).items():
        weight: Any = layer.weight
        rows = weight.shape[1] if isinstance(layer, Conv1D) else weight.shape[0]
        sizes[f"{name}.weight"] = quantised.packed_bytes(weight.numel(), rows, bits)
        bias: Any = layer.bias
        if bias is not None:
            sizes[f"{name}.bias"] = bias.numel() * config.precision.computes_in.size_bytes
    return sizes


def pack(model: PreTrainedModel, config: RunConfig) -> None:
    """Have a model that is to be traced compute as its quantised layers do."""
    bits = quantization_of(config.model)
    if bits == NOT_QUANTIZED:
        return
    compute = getattr(torch, TORCH_DTYPES[config.precision.compute_dtype])
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
