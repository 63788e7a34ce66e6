"""Where the gradient noise scale cannot be measured: no gradient of a smaller batch is there."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.rank_layout import RankLayout
from shardwright.train.config.sections import Sections
from shardwright.train.config.strategy import FsdpStrategy, ZeroStrategy
from shardwright.train.config.trainer import accumulation_steps
from shardwright.train.errors import UserError

_FIELD = "trainer.debug.noise_scale=true"


def contradictions(config: Sections, layout: RankLayout | None) -> Iterator[str]:
    """Yield why there is nothing to compare a step's gradient with. Pure."""
    if not config.trainer.debug.noise_scale:
        return
    strategy = config.strategy
    if isinstance(strategy, ZeroStrategy):
        yield (
            f"{_FIELD} needs the gradient of a part of a step, but under strategy=zero DeepSpeed "
            "has reduced it within its backward pass; choose strategy=ddp, fsdp or single, or set "
            "it to false"
        )
        return
    if isinstance(strategy, FsdpStrategy) and not strategy.reduce_each_micro_batch:
        yield (
            f"{_FIELD} needs the gradient of the first micro-batch, which "
            "strategy.reduce_each_micro_batch=false leaves where FSDP alone finds it; set one of "
            "them to the other value"
        )
    if layout is not None and isinstance(strategy, FsdpStrategy) and layout.replicas > 1:
        yield (
            f"{_FIELD} needs the gradient of the first micro-batch, but strategy.replicas="
            f"{layout.replicas} add theirs up after the last one alone; set strategy.replicas=1, "
            "or set it to false"
        )
    if config.precision.computes_in.scales_losses:
        yield (
            f"{_FIELD} compares gradients as they are, but precision.compute_dtype="
            f"{config.precision.compute_dtype} scales them by a factor that changes; choose "
            "precision=bf16, or set it to false"
        )
    if layout is None or not isinstance(config.trainer.micro_batch_size, int):
        return
    if strategy.kind == "ddp":
        if layout.data_parallel_size == 1:
            yield (
                f"{_FIELD} compares what ranks add to a step under strategy=ddp, but there is one; "
                "start two, or choose strategy=single"
            )
        return
    try:
        steps = accumulation_steps(config.trainer, layout)
    except UserError:  # which is told in any case
        return
    if steps == 1:
        yield (
            f"{_FIELD} compares a step's first micro-batch with all of them, but there is one "
            f"(trainer.micro_batch_size={config.trainer.micro_batch_size}); set "
            "trainer.micro_batch_size to a smaller one, choose strategy=ddp, or set it to false"
        )
