"""The only place that knows the engines: config -> settings, live engine -> facts and weights.

Each is a class of `Engine`. Nothing outside this folder and the rules of train/config/ asks which
strategy it is. Importing it needs no torch, so that a dry run can print the settings.
"""

from __future__ import annotations

from typing import Any

from shardwright.train.config import RunConfig, rank_layout
from shardwright.train.config.section import unresolved
from shardwright.train.strategy.engine import Engine
from shardwright.train.strategy.fsdp.engine import Fsdp
from shardwright.train.strategy.replicated import Replicated
from shardwright.train.strategy.zero.engine import Zero

_ENGINES: dict[str, type[Engine]] = {
    "single": Replicated,
    "ddp": Replicated,
    "zero": Zero,
    "fsdp": Fsdp,
}


def engine_of(config: RunConfig, world_size: int | None = None) -> Engine:
    """Return the engine that a config asks for.

    ``world_size`` is the number of ranks that are there; without it the launcher's, which whoever
    starts ranks by hand need not follow. Raises UserError where they cannot be laid out.
    """
    if config.strategy.kind not in _ENGINES:
        raise unresolved("strategy.kind", f"one of {', '.join(_ENGINES)}")
    ranks = config.launcher.world_size if world_size is None else world_size
    return _ENGINES[config.strategy.kind](config, rank_layout(config.strategy, ranks))


def engine_settings(config: RunConfig) -> dict[str, Any]:
    """Return the engine settings that result from a resolved config. Pure."""
    return engine_of(config).settings()
