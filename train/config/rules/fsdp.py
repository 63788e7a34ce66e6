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
    if strategy.block_class is not None and strategy.wrap != "transformer":
        yield (
            f"strategy.block_class={strategy.block_class} is read under strategy.wrap=transformer "
            f"only, but it is {strategy.wrap}; set strategy.wrap=transformer or block_class=null"
        )
    if strategy.wrap == "none" and not strategy.reshard_after_forward:
        yield (
            "strategy.wrap=none makes the model one unit, which is kept gathered between forward "
            "and backward anyway; leave strategy.reshard_after_forward=true or choose another wrap"
        )
