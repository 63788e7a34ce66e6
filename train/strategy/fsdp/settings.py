"""From config to the arguments of `fully_shard`."""

from __future__ import annotations

from typing import Any

from shardwright.train.config import FsdpStrategy, RankLayout, RunConfig
from shardwright.train.strategy.dtypes import TORCH_DTYPES


def settings(config: RunConfig, layout: RankLayout) -> dict[str, Any]:
    """Return the arguments of `fully_shard`, dtypes by their torch names."""
    strategy, precision = config.strategy, config.precision
    assert isinstance(strategy, FsdpStrategy)
    if strategy.replicas > 1:
        shape, names = [layout.replicas, layout.shards], ["replicate", "shard"]
    else:
        shape, names = [layout.shards], ["shard"]
    return {
        "mesh": {"shape": shape, "names": names},
        "wrap": strategy.wrap,
        "block_class": strategy.block_class,
        "min_unit_parameters": strategy.min_unit_parameters if strategy.wrap == "size" else None,
        "reshard_after_forward": strategy.reshard_after_forward,
        "reshard_ranks": strategy.reshard_ranks,
        "mixed_precision": {
            "param_dtype": TORCH_DTYPES[precision.compute_dtype],
            "reduce_dtype": TORCH_DTYPES[precision.reduce_dtype],
            "cast_forward_inputs": True,
        },
        "offload": {"cpu": strategy.offload, "pin_memory": _pins(config)},
        "reduce_each_micro_batch": strategy.reduce_each_micro_batch,
        "prefetch_units": strategy.prefetch_units,
    }


def _pins(config: RunConfig) -> bool:
    # There is nothing to pin memory for without a GPU.
    assert isinstance(config.strategy, FsdpStrategy)
    return (
        config.strategy.offload and config.strategy.pin_memory and config.launcher.device == "cuda"
    )
