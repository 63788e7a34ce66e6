"""Who shares data with whom, who shards with whom, and what divides."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from shardwright.train.config import BatchSizes, RankLayout, StrategyConfig, rank_layout
from shardwright.train.data.batches.sampler import EvalBatches, Portion, SampleKey, TrainBatches
from shardwright.train.errors import UserError

SIXTEEN = RankLayout(replicas=2, shards=2, sequence=2, tensor=2)
DIMENSIONS = ("replicas", "shards", "sequence", "tensor")
LAYOUTS = st.builds(RankLayout, *[st.integers(1, 3)] * 4)


def constant(size: int) -> BatchSizes:
    return BatchSizes(size, size)


def strategy(**values: Any) -> StrategyConfig:
    found: StrategyConfig = TypeAdapter(StrategyConfig).validate_python(values)
    return found


def test_sixteen_ranks() -> None:
    assert (SIXTEEN.world_size, SIXTEEN.data_parallel_size) == (16, 4)
    # Replica, shard, part of the sequence, part of each matrix: the last is the innermost.
    assert [
        (
            SIXTEEN.replica_rank(rank),
            SIXTEEN.shard_rank(rank),
            SIXTEEN.sequence_rank(rank),
            SIXTEEN.tensor_rank(rank),
        )
        for rank in range(16)
    ] == list(itertools.product(range(2), repeat=4))
    assert SIXTEEN.group(6, "tensor") == (6, 7)
    assert SIXTEEN.group(6, "sequence") == (4, 6)
    assert SIXTEEN.sharding_peers(6) == (2, 6)
    assert SIXTEEN.group(6, "replicas") == (6, 14)
    assert SIXTEEN.same_samples(6) == (4, 5, 6, 7)
    assert SIXTEEN.copies(6) == (4, 6, 12, 14)
    assert [SIXTEEN.data_parallel_rank(rank) for rank in range(16)] == [
        *([0] * 4),
        *([1] * 4),
        *([2] * 4),
        *([3] * 4),
    ]


@given(layout=LAYOUTS, within=st.sets(st.sampled_from(DIMENSIONS)))
def test_groups_are_partitions(layout: RankLayout, within: set[Any]) -> None:
    ranks = range(layout.world_size)
    groups = {layout.group(rank, *sorted(within)) for rank in ranks}
    assert sorted(itertools.chain(*groups)) == list(ranks)
    sizes = {len(group) for group in groups}
    expected = 1
    for name in within:
        expected *= getattr(layout, name)
    assert sizes == {expected}
    assert all(rank in layout.group(rank, *sorted(within)) for rank in ranks)


@given(layout=LAYOUTS)
def test_a_place_belongs_to_one_rank(layout: RankLayout) -> None:
    places = {
        (
            layout.replica_rank(rank),
            layout.shard_rank(rank),
            layout.sequence_rank(rank),
            layout.tensor_rank(rank),
        )
        for rank in range(layout.world_size)
    }
    assert len(places) == layout.world_size


@given(layout=LAYOUTS)
def test_a_part_of_the_data_goes_to_those_that_divide_its_samples(layout: RankLayout) -> None:
    parts: dict[int, list[int]] = {}
    for rank in range(layout.world_size):
        parts.setdefault(layout.data_parallel_rank(rank), []).append(rank)
    assert list(parts) == list(range(layout.data_parallel_size))
    for same in parts.values():
        assert {layout.same_samples(rank) for rank in same} == {tuple(same)}


@given(layout=LAYOUTS)
def test_the_shards_of_a_replica_make_the_model_whole_once(layout: RankLayout) -> None:
    for rank in range(layout.world_size):
        peers = layout.sharding_peers(rank)
        assert [layout.shard_rank(peer) for peer in peers] == list(range(layout.shards))
        held = {(layout.shard_rank(r), layout.tensor_rank(r)) for r in layout.copies(rank)}
        assert held == {(layout.shard_rank(rank), layout.tensor_rank(rank))}
        assert len(layout.copies(rank)) * layout.shards * layout.tensor == layout.world_size


@given(layout=LAYOUTS, micro_batch_size=st.integers(1, 3), accumulation=st.integers(1, 3))
def test_a_step_has_each_sample_once_however_many_ranks_divide_it(
    layout: RankLayout, micro_batch_size: int, accumulation: int
) -> None:
    by_part: dict[int, list[list[SampleKey]]] = {}
    for rank in range(layout.world_size):
        batches = TrainBatches(
            seed=1,
            samples_per_epoch=1000,
            data_parallel_rank=layout.data_parallel_rank(rank),
            data_parallel_size=layout.data_parallel_size,
            batches=constant(micro_batch_size * accumulation * layout.data_parallel_size),
            accumulation_steps=accumulation,
            steps=1,
        )
        found = by_part.setdefault(layout.data_parallel_rank(rank), list(batches))
        assert list(batches) == found
    seen = [key for part in by_part.values() for batch in part for key in batch]
    assert len(seen) == micro_batch_size * accumulation * layout.data_parallel_size
    assert len(set(seen)) == len(seen)


@given(layout=LAYOUTS, samples=st.integers(0, 60))
def test_an_evaluation_sees_each_sample_once(layout: RankLayout, samples: int) -> None:
    firsts = [min(layout.same_samples(rank)) for rank in range(layout.world_size)]
    seen = [
        key.sample
        for rank in sorted(set(firsts))
        for batch in EvalBatches(
            [Portion(0, samples)], layout.data_parallel_rank(rank), layout.data_parallel_size, 2
        )
        for key in batch
        if key.counted
    ]
    assert sorted(seen) == list(range(samples))


@pytest.mark.parametrize(
    ("values", "world_size", "replicas", "shards"),
    [
        ({"kind": "single"}, 1, 1, 1),
        ({"kind": "ddp"}, 8, 8, 1),
        ({"kind": "zero", "stage": 0}, 8, 8, 1),
        ({"kind": "zero", "stage": 1}, 8, 1, 8),
        ({"kind": "zero", "stage": 2}, 8, 1, 8),
        ({"kind": "zero", "stage": 3}, 8, 1, 8),
        # A second copy of what is gathered, none of what is updated.
        ({"kind": "zero", "stage": 3, "hierarchical_partition_ranks": 2}, 8, 1, 8),
        ({"kind": "fsdp"}, 8, 1, 8),
        ({"kind": "fsdp", "replicas": 2}, 8, 2, 4),
        ({"kind": "fsdp", "replicas": 8}, 8, 8, 1),
    ],
)
def test_layout_of_a_strategy(
    values: dict[str, Any], world_size: int, replicas: int, shards: int
) -> None:
    layout = rank_layout(strategy(**values), world_size)
    assert layout == RankLayout(replicas=replicas, shards=shards)
    assert layout.data_parallel_size == layout.world_size == world_size
    assert [layout.data_parallel_rank(rank) for rank in range(world_size)] == [*range(world_size)]


def test_sequence_and_tensor_are_taken_off_before_the_strategy_divides() -> None:
    hybrid = strategy(kind="fsdp", replicas=2)
    assert rank_layout(hybrid, 16, sequence=2, tensor=2) == SIXTEEN
    assert rank_layout(strategy(kind="single"), 4, tensor=4) == RankLayout(tensor=4)
    assert rank_layout(strategy(kind="ddp"), 8, sequence=2) == RankLayout(replicas=4, sequence=2)


@pytest.mark.parametrize(
    ("values", "sizes", "message"),
    [
        ({"kind": "single"}, {"world_size": 2}, r"launcher\.nproc_per_node=2; choose strategy=ddp"),
        ({"kind": "single"}, {"world_size": 8, "tensor": 4}, "strategy=single runs one rank"),
        (
            {"kind": "fsdp", "replicas": 3},
            {"world_size": 8},
            r"strategy\.replicas=3 does not divide the 8 rank\(s\) into equal shards",
        ),
        (
            {"kind": "fsdp", "replicas": 4},
            {"world_size": 8, "sequence": 4},
            r"strategy\.replicas=4 does not divide the 2 rank\(s\)",
        ),
        (
            {"kind": "ddp"},
            {"world_size": 8, "sequence": 3, "tensor": 2},
            r"3 rank\(s\) a sequence x 2 rank\(s\) a matrix = 6 do not divide the 8 rank\(s\)",
        ),
    ],
)
def test_what_does_not_divide_is_refused(
    values: dict[str, Any], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rank_layout(strategy(**values), **sizes)
