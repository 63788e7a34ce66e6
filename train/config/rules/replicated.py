"""What one rank alone, or DDP, cannot honour."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.rank_layout import RankLayout
from shardwright.train.config.sections import Sections


def contradictions(config: Sections, layout: RankLayout | None) -> Iterator[str]:
    """Yield a message for each value that neither can honour. Pure.

    ``layout`` is None where it is not known yet.
    """
    precision = config.precision
    compresses = precision.reduce_dtype == "bf16" and precision.master_dtype == "fp32"
    if config.strategy.kind == "ddp" and compresses and config.launcher.device == "cpu":
        yield (
            "precision.reduce_dtype=bf16 under strategy=ddp needs NCCL, but launcher.device=cpu; "
            "set precision.reduce_dtype=fp32"
        )
