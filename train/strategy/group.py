"""A rank's membership of the process group on which its engine works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shardwright.train.config import RunConfig
from shardwright.train.process import numerics
from shardwright.train.process.group import member
from shardwright.train.process.rank import Rank
from shardwright.train.strategy import engine_of


@contextmanager
def join(config: RunConfig, rank: Rank) -> Iterator[None]:
    """Be a member of the process group inside the block, and have the engine take it as its own.

    It computes by kernels that repeat where the config asks for that. As
    `shardwright.train.process.group.member` otherwise.
    """
    with numerics.kernels(deterministic=config.trainer.deterministic), member(config, rank):
        engine_of(config, rank.world_size).adopt_process_group()
        yield
