"""A model under ZeRO whose weights are only read: what there is of the engine, and its facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.train.config import RankLayout, RunConfig, ZeroStrategy
from shardwright.train.errors import UserError
from shardwright.train.strategy.dtypes import TORCH_DTYPES
from shardwright.train.strategy.zero import facts

if TYPE_CHECKING:
    from shardwright.train.strategy.training import Training

_OF_PARAMETERS = (
    *("engine", "world_size", "stage", "bf16", "fp16", "parameters_sharded"),
    *("offload_parameters", "prefetch_elements", "persistence_elements"),
)
"""Facts of a training's engine at stage 3 that do not depend on its optimizer."""


def check(strategy: ZeroStrategy) -> None:
    """Raise UserError where only the engine of a training would make the forward passes asked for.

    DeepSpeed 0.19 builds none at stages 1 and 2 without an optimizer (runtime/engine.py,
    _configure_zero_optimizer), and its engine is what casts by that section.
    """
    if strategy.stage < 3 and "data_types" in strategy.extra:
        raise UserError(
            f"strategy.extra.data_types={strategy.extra['data_types']} is what DeepSpeed's engine "
            f"of a training casts at stage {strategy.stage}, and there is none where nothing is "
            "trained; evaluate with strategy=zero3, or without it (strategy.extra={})"
        )


def without_optimizer(config: RunConfig) -> RunConfig:
    """Return a config that keeps no place for an optimizer in host memory or on a disk. Pure."""
    strategy = config.strategy.model_copy(update={"offload_optimizer": "none"})
    return config.model_copy(update={"strategy": strategy})


def expected(config: RunConfig, layout: RankLayout) -> dict[str, Any]:
    """Return the facts that `read_back` must find. Pure."""
    dtypes = {"parameter_dtypes": [TORCH_DTYPES[config.precision.compute_dtype]]}
    assert isinstance(config.strategy, ZeroStrategy)
    if config.strategy.stage < 3:
        return {"engine": "none", **dtypes}
    of_training = facts.expected(without_optimizer(config), layout)
    kept = {name: of_training[name] for name in _OF_PARAMETERS}
    return {**kept, **dtypes, "holds": "DeepSpeedZeRoOffload"}


def read_back(trainer: Training) -> dict[str, Any]:
    """Return facts read off what makes the forward passes."""
    import deepspeed

    from shardwright.train.model.quantised import whole_parameters

    engine = trainer.model_wrapped
    dtypes = {
        "parameter_dtypes": sorted(
            {str(p.dtype).removeprefix("torch.") for _, p in whole_parameters(trainer.model)}
        )
    }
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        name = "none" if engine is trainer.model else type(engine).__name__
        return {"engine": name, **dtypes}
    return {**facts.of_parameters(engine), **dtypes, "holds": type(engine.optimizer).__name__}
