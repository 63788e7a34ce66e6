"""Matrix products of the blocks' linear layers in fp8, by torchao."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardwright.train.config.precision import FP8_RECIPES
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig
    from transformers import PreTrainedModel

    from shardwright.train.config import RunConfig

logger = logging.getLogger(__name__)

MULTIPLE = 16
"""The GPU's fp8 products take dimensions that are multiples of this."""


def convert(model: PreTrainedModel, config: RunConfig) -> None:
    """Let the blocks' linear layers multiply in fp8, in place; parameters and names stay.

    Layers with a dimension that is no multiple of 16 stay as they are, as do embeddings and head.
    Raises UserError where the GPU or torchao is lacking, or the blocks have no layer to convert.
    """
    recipe = config.precision.fp8_recipe
    if recipe is None:
        return
    _check_device(recipe, config.launcher.device)
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"precision.fp8_recipe={recipe} needs the package torchao, which is not installed; "
            "`pip install torchao`, or choose precision=bf16"
        )
    from torchao.float8 import convert_to_float8_training

    layers = {layer for layer in linear_layers(model) if fits(layer)}
    if not layers:
        raise UserError(
            f"precision.fp8_recipe={recipe} finds no linear layer in the blocks of "
            f"{type(model).__name__} whose dimensions are multiples of {MULTIPLE}; "
            "choose precision=bf16 or another model"
        )
    convert_to_float8_training(
        model, config=torchao_config(recipe), module_filter_fn=lambda layer, name: layer in layers
    )
    if config.trainer.compile is False:
        logger.warning(
            "fp8 with trainer.compile=false is slower than bf16: torchao leaves the casts to "
            "the compiler"
        )


def torchao_config(recipe: str) -> Float8LinearConfig:
    """Return what torchao calls the recipe: scales per tensor or per row."""
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig.from_recipe_name(recipe)


def linear_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the linear layers of the blocks, in order, converted or not."""
    from shardwright.train.model.blocks import blocks

    return [m for block in blocks(model) for m in block.modules() if isinstance(m, nn.Linear)]


def fits(layer: nn.Linear) -> bool:
    """Return whether the GPU's fp8 product takes the layer's dimensions."""
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def read_back(model: PreTrainedModel) -> dict[str, Any]:
    """Return facts read off the live layers."""
    torchao = sys.modules.get("torchao.float8.float8_linear")
    if torchao is None:
        return {"fp8_recipe": None, "fp8_layers": 0}
    layers = linear_layers(model)
    converted = [layer for layer in layers if isinstance(layer, torchao.Float8Linear)]
    if not converted:
        return {"fp8_recipe": None, "fp8_layers": 0}
    left = [layer for layer in layers if layer not in converted]
    recipes = {_recipe_of(layer.config) for layer in converted}
    return {
        "fp8_recipe": " and ".join(sorted(recipes)),
        "fp8_layers": len(converted),
        "fp8_layers_left_out": len(left),
        "fp8_layers_missed": sum(map(fits, left)),
    }


def _recipe_of(config: Float8LinearConfig) -> str:
    from torchao.float8.config import Float8LinearRecipeName

    def comparable(config: Float8LinearConfig) -> Float8LinearConfig:
        return dataclasses.replace(config, emulate=False)

    for recipe in Float8LinearRecipeName:
        if comparable(config) == comparable(torchao_config(recipe.value)):
            return str(recipe.value)
    return repr(config)


def _check_device(recipe: str, device: str) -> None:
    if device == "cpu":
        raise UserError(
            f"precision.fp8_recipe={recipe} needs a GPU, but the ranks run on cpu; "
            "choose precision=bf16"
        )
    major, minor = torch.cuda.get_device_capability()
    needed = FP8_RECIPES[recipe].compute_capability
    if (major, minor) < divmod(round(10 * needed), 10):
        raise UserError(
            f"precision.fp8_recipe={recipe} needs compute capability {needed}, but this rank's GPU "
            f"has {major}.{minor}; choose precision=bf16"
        )
