"""The only place that knows the engines: config -> settings, live engine -> facts and weights.

Each module is one engine and gives the functions of `Engine`. Nothing outside this folder and
the rules of train/config/ asks which strategy it is. Importing it needs no torch, so that a dry run
can print the settings.
"""

from __future__ import annotations

from typing import Any

from train.config import RunConfig, rank_layout
from train.strategy import replicated
from train.strategy.engine import Engine
from train.strategy.fsdp import engine as fsdp
from train.strategy.zero import engine as zero


def engine_of(config: RunConfig) -> Engine:
    """Return the module of the engine that the config asks for."""
    engines: dict[str, Engine] = {
        "single": replicated,
        "ddp": replicated,
        "zero": zero,
        "fsdp": fsdp,
    }
    return engines[config.strategy.kind]


def engine_settings(config: RunConfig) -> dict[str, Any]:
    """Return the engine settings that result from a resolved config. Pure."""
    layout = rank_layout(config.strategy, config.launcher.world_size)
    return engine_of(config).settings(config, layout)
