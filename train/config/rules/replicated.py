"""What one rank alone, or DDP, cannot honour."""

from __future__ import annotations

from collections.abc import Iterator

from train.config.sections import Sections


def contradictions(config: Sections, world_size: int | None) -> Iterator[str]:
    """Yield a message for each value that neither can honour. Pure.

    ``world_size`` is None where it is not known yet.
    """
    if config.strategy.kind == "single" and world_size not in (1, None):
        yield (
            f"strategy=single runs one rank, but launcher.nproc_per_node={world_size}; "
            "choose strategy=ddp or launcher.nproc_per_node=1"
        )
    precision = config.precision
    compresses = precision.reduce_dtype == "bf16" and precision.master_dtype == "fp32"
    if config.strategy.kind == "ddp" and compresses and config.launcher.device == "cpu":
        yield (
            "precision.reduce_dtype=bf16 under strategy=ddp needs NCCL, but launcher.device=cpu; "
            "set precision.reduce_dtype=fp32"
        )
