"""The order of samples: a permutation, the same for every world size, cheap to seek in."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.train.config import BatchSizes
from shardwright.train.data.batches.sampler import (
    EvalBatches,
    Portion,
    SampleKey,
    TrainBatches,
    permuted,
    sample_at,
)


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 10**6), size=st.integers(1, 300))
def test_each_epoch_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    assert sorted(permuted((seed, epoch), size, i) for i in range(size)) == list(range(size))


def test_a_large_epoch_is_a_permutation() -> None:
    assert len({permuted((1, 2), 100_003, i) for i in range(100_003)}) == 100_003


@pytest.mark.parametrize("size", [2, 10, 65])
def test_every_sample_comes_first_about_equally_often(size: int) -> None:
    seeds = 400 * size
    firsts = Counter(permuted((seed, 0), size, 0) for seed in range(seeds))
    # Four standard deviations of a count of 400 expected.
    assert all(abs(firsts[i] - 400) < 80 for i in range(size))


def test_neighbours_are_scattered() -> None:
    order = [permuted((0, 0), 10_000, i) for i in range(10_000)]
    steps = [abs(a - b) for a, b in itertools.pairwise(order)]
    # Two independent uniform draws are a third of the range apart on average.
    assert sum(steps) / len(steps) == pytest.approx(10_000 / 3, rel=0.03)


def test_epochs_and_seeds_order_differently() -> None:
    orders = {
        tuple(sample_at(seed, 50, 50 * epoch + i).sample for i in range(50))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_does_not_change_between_releases() -> None:
    # A resumed run has to go on in the order that it began with.
    first_epoch = [sample_at(7, 10, i) for i in range(10)]
    assert first_epoch == [SampleKey(0, i) for i in (9, 6, 2, 1, 7, 3, 0, 4, 5, 8)]


def test_seeking_far_needs_nothing_before() -> None:
    key = sample_at(0, 10**12, 12_345_678_901_234_567)
    assert key.epoch == 12_345
    assert 0 <= key.sample < 10**12


def batches(
    world_size: int,
    micro_batch_size: int,
    accumulation: int,
    steps: int = 5,
    start: int = 0,
    grows: BatchSizes | None = None,
) -> list[list[list[SampleKey]]]:
    """Return for each rank its micro-batches."""
    size = world_size * micro_batch_size * accumulation
    return [
        list(
            TrainBatches(
                seed=3,
                samples_per_epoch=37,
                data_parallel_rank=rank,
                data_parallel_size=world_size,
                batches=grows or BatchSizes(size, size),
                accumulation_steps=accumulation,
                steps=steps,
                start_sample=start,
            )
        )
        for rank in range(world_size)
    ]


SPLITS = [(w, m, 12 // (w * m)) for w in (1, 2, 3, 4, 6, 12) for m in (1, 2, 3, 4, 6, 12)]
SPLITS = [(w, m, a) for w, m, a in SPLITS if w * m * a == 12]


@pytest.mark.parametrize(("world_size", "micro_batch_size", "accumulation"), SPLITS)
def test_a_step_has_the_same_samples_however_the_batch_is_split(
    world_size: int, micro_batch_size: int, accumulation: int
) -> None:
    ranks = batches(world_size, micro_batch_size, accumulation)
    assert all(len(rank) == 5 * accumulation for rank in ranks)
    for step in range(5):
        inside = slice(step * accumulation, (step + 1) * accumulation)
        seen = [key for rank in ranks for batch in rank[inside] for key in batch]
        expected = [sample_at(3, 37, position) for position in range(12 * step, 12 * step + 12)]
        assert sorted(seen) == sorted(expected)


def test_micro_batches_are_the_same_on_one_rank_and_on_four() -> None:
    (alone,), four = batches(1, 3, 4), batches(4, 3, 1)
    assert alone == [four[rank][step] for step in range(5) for rank in range(4)]


def test_epochs_follow_each_other_without_dropping_samples() -> None:
    (rank,) = batches(1, 12, 1, steps=37)
    seen = Counter(key for batch in rank for key in batch)
    assert seen == Counter(SampleKey(e, i) for e in range(12) for i in range(37))


@given(start=st.integers(0, 500), world_size=st.sampled_from([1, 2, 4]))
def test_going_on_gives_what_would_have_followed(start: int, world_size: int) -> None:
    (through,) = batches(1, 1, 1, steps=start + 24)
    ranks = batches(world_size, 3, 4 // world_size, steps=2, start=start)
    assert sorted(k for r in ranks for b in r for k in b) == sorted(b[0] for b in through[start:])


@given(
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    begun=st.integers(0, 12),
    smallest=st.integers(12, 30),
    warmup=st.integers(1, 400),
)
def test_a_growing_batch_is_the_same_on_any_ranks_and_resumed_at_any_step(
    world_size: int, begun: int, smallest: int, warmup: int
) -> None:
    grows = BatchSizes(36, smallest, warmup)
    (whole,) = batches(1, 3, 12, steps=20, grows=grows)
    accumulation = 12 // world_size
    start = grows.after(0, begun)
    ranks = batches(world_size, 3, accumulation, steps=20 - begun, start=start, grows=grows)
    # Micro-batch for micro-batch, in the order in which they count in the loss.
    order = range(accumulation * (20 - begun))
    assert [ranks[r][i] for i in order for r in range(world_size)] == whole[12 * begun :]
    positions = range(grows.after(0, 20))
    assert [key for batch in whole for key in batch] == [sample_at(3, 37, p) for p in positions]
    for step in range(20):
        sizes = [len(batch) for batch in whole[12 * step : 12 * step + 12]]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@given(
    samples=st.integers(0, 100), world_size=st.integers(1, 5), micro_batch_size=st.integers(1, 7)
)
def test_evaluation_sees_each_sample_once_in_equal_batches(
    samples: int, world_size: int, micro_batch_size: int
) -> None:
    ranks = [
        list(EvalBatches([Portion(0, samples)], rank, world_size, micro_batch_size))
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(batch) == micro_batch_size for rank in ranks for batch in rank)
    counted = [key.sample for rank in ranks for batch in rank for key in batch if key.counted]
    assert sorted(counted) == list(range(samples))


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    world_size=st.sampled_from([1, 2, 3, 4]),
    micro_batch_size=st.integers(1, 5),
)
def test_a_batch_of_an_evaluation_is_of_one_set(
    sizes: list[int], world_size: int, micro_batch_size: int
) -> None:
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    portions = [Portion(first, size) for first, size in zip(firsts, sizes, strict=True)]
    ranks = [
        EvalBatches(portions, rank, world_size, micro_batch_size) for rank in range(world_size)
    ]
    batches = [list(rank) for rank in ranks]
    of_sets = list(ranks[0].sets())
    assert {len(of_rank) for of_rank in batches} == {len(of_sets)} == {len(ranks[0])}
    counted: list[tuple[int, int]] = []
    for of_rank in batches:
        for batch, of_set in zip(of_rank, of_sets, strict=True):
            assert len(batch) == micro_batch_size
            assert {key.held_out_set for key in batch} == {of_set}
            first = firsts[of_set]
            assert all(first <= key.sample < first + sizes[of_set] for key in batch)
            counted += [(of_set, key.sample) for key in batch if key.counted]
    expected = [(n, firsts[n] + i) for n, size in enumerate(sizes) for i in range(size)]
    assert sorted(counted) == expected


def test_micro_batches_of_an_evaluation_are_the_same_for_every_world_size() -> None:
    """So that the sums over them are, to the last bit."""
    portions = [Portion(0, 23), Portion(23, 5), Portion(0, 9)]
    seen = []
    for world_size in (1, 2, 3, 5):
        ranks = [EvalBatches(portions, rank, world_size, 4) for rank in range(world_size)]
        counted = [
            [key for key in batch if key.counted]
            for batches in zip(*ranks, strict=True)
            for batch in batches
        ]
        seen.append([batch for batch in counted if batch])
    assert all(batches == seen[0] for batches in seen)
