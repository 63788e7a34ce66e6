"""The packages that a run needs beside those of every run, by the settings that need them."""

from __future__ import annotations

from shardwright.train.config.adapter import PACKAGE as PEFT
from shardwright.train.config.model import NOT_QUANTIZED, QUANTIZER, quantization_of
from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.sections import Sections


def needed(config: Sections) -> dict[str, str]:
    """Return the name of a package for each setting that needs one. Pure."""
    optimizer, recipe = config.trainer.optimizer, config.precision.fp8_recipe
    bits, adapter = quantization_of(config.model), config.adapter
    packages = {
        f"adapter={adapter.kind}": None if adapter.trains_all else PEFT,
        f"model.quantization={bits}": None if bits == NOT_QUANTIZED else QUANTIZER,
        f"precision.fp8_recipe={recipe}": None if recipe is None else "torchao",
        f"strategy.kind={config.strategy.kind}": config.strategy.package,
        f"trainer.optimizer={optimizer}": OPTIMIZERS[optimizer].package,
    }
    return {setting: package for setting, package in packages.items() if package is not None}
