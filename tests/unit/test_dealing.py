"""Matrices are dealt out so that no rank has much more to do than it has to."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from shardwright.train.optimizer.dealing import dealt, rows_of


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 1024])
@pytest.mark.parametrize("count", [0, 1, 7, 224])
def test_all_is_dealt_once_and_evenly(workers: int, count: int) -> None:
    chance = random.Random(count)
    costs = [chance.choice([1.0, 4.0, 10.7, 11.0]) for _ in range(count)]
    hands = dealt(costs, workers)
    assert sorted(itertools.chain(*hands)) == list(range(count))
    loads = [sum(costs[number] for number in hand) for hand in hands]
    # Nobody can do better than the mean, or than the costliest piece takes.
    least = max([sum(costs) / workers, *costs, 0.0])
    assert max(loads) <= least * 4 / 3
    for hand in hands:
        assert [costs[n] for n in hand] == sorted((costs[n] for n in hand), reverse=True)
    assert dealt(costs, workers) == hands


def test_equal_work_goes_round() -> None:
    assert dealt([1.0] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert dealt([1.0, 5.0, 2.0, 2.0], 2) == [[1], [2, 3, 0]]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_shards_have_the_rows_that_torch_gives_them(parts: int) -> None:
    for rows in (1, 2, 5, 6, 9, 33):
        chunks = [len(chunk) for chunk in torch.empty(rows, 2).chunk(parts)]
        chunks += [0] * (parts - len(chunks))
        assert [rows_of(rows, part, parts) for part in range(parts)] == chunks
