"""What FSDP2 cannot honour."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.rank_layout import RankLayout
from shardwright.train.config.sections import Sections
from shardwright.train.config.strategy import FsdpStrategy


def contradictions(config: Sections, layout: RankLayout | None) -> Iterator[str]:
    """Yield a message for each value that FSDP2 cannot honour. Pure.

    ``layout`` is None where it is not known yet.
    """
    strategy = config.strategy
    assert isinstance(strategy, FsdpStrategy)
    if layout is not None and layout.replicas > 1 and layout.shards == 1:
        yield (
            f"strategy.replicas={strategy.replicas} on {layout.world_size} rank(s) shards nothing; "
            "choose fewer replicas, or strategy=ddp"
        )
    if strategy.block_classes and strategy.wrap != "transformer":
        yield (
            f"strategy.block_class={','.join(strategy.block_classes)} is read under "
            f"strategy.wrap=transformer only, but it is {strategy.wrap}; set "
            "strategy.wrap=transformer or block_class=null"
        )
    yield from _reshard_ranks(strategy, layout)
    if strategy.wrap == "none" and not strategy.reshard_after_forward:
        yield (
            "strategy.wrap=none makes the model one unit, which is kept gathered between forward "
            "and backward anyway; leave strategy.reshard_after_forward=true or choose another wrap"
        )


def _reshard_ranks(strategy: FsdpStrategy, layout: RankLayout | None) -> Iterator[str]:
    ranks = strategy.reshard_ranks
    if ranks is None:
        return
    if not strategy.reshard_after_forward or strategy.wrap == "none":
        kept_by = "reshard_after_forward=false" if strategy.wrap != "none" else "wrap=none"
        yield (
            f"strategy.reshard_ranks={ranks} says among how many ranks parameters are divided "
            f"between forward and backward, where strategy.{kept_by} keeps them whole on each; "
            "set strategy.reshard_ranks=null or change the other"
        )
    elif ranks == 1:
        yield (
            "strategy.reshard_ranks=1 would keep all parameters on each rank between forward and "
            "backward; say so with strategy.reshard_after_forward=false"
        )
    elif layout is not None and (ranks >= layout.shards or layout.shards % ranks):
        yield (
            f"strategy.reshard_ranks={ranks} does not divide the {layout.shards} shard(s) of the "
            "model into several equal groups; choose a smaller divisor, such as the ranks of a "
            "node, or null"
        )
