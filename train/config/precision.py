"""The section "precision": which number goes in which dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import model_validator

from shardwright.train.config.section import PositiveFloat, PositiveInt, Section


@dataclass(frozen=True)
class Dtype:
    """What is known of a dtype of ours without torch."""

    torch_name: str
    size_bytes: int
    largest_weight: float = 2.0**64
    """Largest magnitude of a weight that is of use in products of this dtype: its copy is finite
    and so is its square, which norms and attention take."""
    scales_losses: bool = False
    """Whether gradients vanish in it unless the loss is multiplied by a factor."""
    compute_capability: float = 0.0
    """First that computes in it on a GPU."""
    cpu_computes: bool = True
    """Whether it can be trained in without a GPU."""


DTYPES = {
    "fp32": Dtype("float32", 4),
    "bf16": Dtype("bfloat16", 2, compute_capability=8.0),
    "fp16": Dtype("float16", 2, largest_weight=65504.0, scales_losses=True, cpu_computes=False),
}
TF32_COMPUTE_CAPABILITY = 8.0


@dataclass(frozen=True)
class Fp8Recipe:
    """What is known of one of torchao's recipes for products in fp8."""

    token_multiple: int = 16
    """What has to divide the tokens of a micro-batch: a weight's gradient is a product over them.
    1 where that product is none in fp8."""
    compute_capability: float = 8.9
    """First that has the products."""
    scales_whole_tensors: bool = False
    """Whether all of a batch is scaled by one number, so that its samples are not independent."""
    keeps_weight_gradients: bool = False
    """Whether the products that give the weights' gradients stay in bf16."""


FP8_RECIPES = {
    "tensorwise": Fp8Recipe(scales_whole_tensors=True),
    "rowwise": Fp8Recipe(),
    "rowwise_with_gw_hp": Fp8Recipe(token_multiple=1, keeps_weight_gradients=True),
}


class PrecisionConfig(Section):
    """Which number goes in which dtype; the defaults mean the same under every engine."""

    compute_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Parameters and activations in the forward and backward pass."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradients while they are summed over ranks."""
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    """Weights that the optimizer updates."""
    moments_dtype: Literal["fp32", "bf16"] = "fp32"
    """The optimizer's running averages."""
    allow_tf32: bool = False
    """Let fp32 matrix products run in TF32 on GPUs that have it."""
    fp8_recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Matrix products of the blocks' linear layers in fp8 (torchao, with compute_dtype=bf16):
    scaled by tensor (fastest), by row, or by row with the weights' gradients in bf16 (most
    precise); null does none. It gains speed only with trainer.compile=true."""
    initial_loss_scale: PositiveFloat = 65536.0
    """fp16: first factor on the loss, a power of two; it halves on overflow."""
    loss_scale_growth_steps: PositiveInt = 1000
    """fp16: steps without overflow after which the factor doubles."""

    @property
    def token_multiple(self) -> int:
        """What has to divide the tokens of a micro-batch."""
        return 1 if self.fp8_recipe is None else FP8_RECIPES[self.fp8_recipe].token_multiple

    @property
    def scales_whole_tensors(self) -> bool:
        """Whether products have one scale for all of a batch."""
        return self.fp8_recipe is not None and FP8_RECIPES[self.fp8_recipe].scales_whole_tensors

    @property
    def fp8_products(self) -> int:
        """How many of a linear layer's three products are in fp8: out, and both gradients."""
        if self.fp8_recipe is None:
            return 0
        return 2 if FP8_RECIPES[self.fp8_recipe].keeps_weight_gradients else 3

    @property
    def computes_in(self) -> Dtype:
        """``compute_dtype``, and what is known of it."""
        return DTYPES[self.compute_dtype]

    @model_validator(mode="after")
    def _dtypes_fit(self) -> PrecisionConfig:
        if self.master_dtype == "bf16" and self.compute_dtype != "bf16":
            raise ValueError(
                f"master_dtype=bf16 cannot serve compute_dtype={self.compute_dtype}, which is more "
                "precise; set master_dtype=fp32 or compute_dtype=bf16"
            )
        if self.moments_dtype != self.master_dtype:
            raise ValueError(
                f"moments_dtype={self.moments_dtype} differs from "
                f"master_dtype={self.master_dtype}, but the optimizers keep their moments in the "
                "dtype of the weights that they update; set both to the same"
            )
        if self.master_dtype == "bf16" and self.reduce_dtype != "bf16":
            raise ValueError(
                f"reduce_dtype={self.reduce_dtype} with master_dtype=bf16: the gradients of bf16 "
                "weights are bf16; set reduce_dtype=bf16 or master_dtype=fp32"
            )
        if self.compute_dtype == "fp32" and self.reduce_dtype == "bf16":
            raise ValueError(
                "reduce_dtype=bf16 would round the gradients of compute_dtype=fp32; "
                "set reduce_dtype=fp32 or compute_dtype=bf16"
            )
        if self.compute_dtype == "fp16" and self.reduce_dtype == "bf16":
            raise ValueError(
                "reduce_dtype=bf16 would round the gradients of compute_dtype=fp16; "
                "set reduce_dtype=fp32"
            )
        if self.fp8_recipe is not None and self.compute_dtype != "bf16":
            raise ValueError(
                f"fp8_recipe={self.fp8_recipe} takes and gives bf16, but "
                f"compute_dtype={self.compute_dtype}; set compute_dtype=bf16 or fp8_recipe=null"
            )
        if math.log2(self.initial_loss_scale) % 1:
            raise ValueError(
                f"initial_loss_scale={self.initial_loss_scale:g} is not a power of two; "
                f"set it to {2 ** round(math.log2(self.initial_loss_scale))}"
            )
        return self
