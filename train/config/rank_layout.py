"""Who shares data with whom, who shards with whom, and what divides: ranks as a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Literal

from shardwright.train.config.strategy import StrategyConfig
from shardwright.train.errors import UserError

Dimension = Literal["replicas", "shards", "sequence", "tensor"]


@dataclass(frozen=True)
class RankLayout:
    """The ranks of a training, each at one place of a grid of four dimensions.

    The last dimension is the innermost: ranks that exchange most, those that divide each matrix,
    are neighbours, mostly on one node; whole replicas, which meet once a step, are farthest apart.
    """

    replicas: int = 1
    """Copies of the whole model state."""
    shards: int = 1
    """Parts into which the model state of one replica is divided; each rank has its own samples."""
    sequence: int = 1
    """Ranks that divide each sample among themselves."""
    tensor: int = 1
    """Ranks that divide each matrix among themselves."""

    def __post_init__(self) -> None:
        assert min(astuple(self)) >= 1, self

    @property
    def world_size(self) -> int:
        return math.prod(astuple(self))

    @property
    def data_parallel_size(self) -> int:
        """Ranks, or groups of ranks, with samples of their own: what divides a batch."""
        return self.replicas * self.shards

    def data_parallel_rank(self, rank: int) -> int:
        """Return which of the parts of a batch a rank gets."""
        return self._index(rank, "replicas") * self.shards + self._index(rank, "shards")

    def replica_rank(self, rank: int) -> int:
        """Return of which copy of the model a rank holds a part."""
        return self._index(rank, "replicas")

    def shard_rank(self, rank: int) -> int:
        """Return which shard of the model state of its replica a rank holds."""
        return self._index(rank, "shards")

    def sequence_rank(self, rank: int) -> int:
        """Return which part of each of its samples a rank computes."""
        return self._index(rank, "sequence")

    def tensor_rank(self, rank: int) -> int:
        """Return which part of each divided matrix a rank holds."""
        return self._index(rank, "tensor")

    def same_samples(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that get the samples that this one gets, itself among them."""
        return self.group(rank, "sequence", "tensor")

    def sharding_peers(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the shards of one replica together, this one among them."""
        return self.group(rank, "shards")

    def copies(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the same part of the model, this one among them."""
        return self.group(rank, "replicas", "sequence")

    def group(self, rank: int, *within: Dimension) -> tuple[int, ...]:
        """Return the ranks whose place differs from this one's in these dimensions alone, sorted.

        Over all ranks such groups are a partition of them.
        """
        ranks = [rank]
        for name in within:
            first = [r - self._index(r, name) * self._stride(name) for r in ranks]
            ranks = [r + i * self._stride(name) for r in first for i in range(getattr(self, name))]
        return tuple(sorted(ranks))

    def _index(self, rank: int, name: Dimension) -> int:
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        size: int = getattr(self, name)
        return rank // self._stride(name) % size

    def _stride(self, name: Dimension) -> int:
        """Return by how much ranks differ that are neighbours in a dimension."""
        return math.prod(self._sizes_within(name))

    def _sizes_within(self, name: Dimension) -> Iterator[int]:
        names = [field.name for field in fields(self)]
        return (getattr(self, inner) for inner in names[names.index(name) + 1 :])


def rank_layout(
    strategy: StrategyConfig, world_size: int, *, sequence: int = 1, tensor: int = 1
) -> RankLayout:
    """Return how a strategy lays out its ranks. Pure.

    Raises UserError where the sizes do not divide the ranks.
    """
    within = sequence * tensor
    if world_size % within:
        raise UserError(
            f"{sequence} rank(s) a sequence x {tensor} rank(s) a matrix = {within} do not divide "
            f"the {world_size} rank(s); choose divisors"
        )
    count = world_size // within
    shards = strategy.shards(count)
    return RankLayout(count // shards, shards, sequence, tensor)
