"""How many samples, in the order in which a run takes them, hold a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from shardwright.train.data.batches.sampler import all_permuted
from shardwright.train.data.batches.samples import Mixture

AT_ONCE = 2**20
"""Samples that are counted together, which bounds memory."""


def samples_of_tokens(mixture: Mixture, tokens: int) -> int:
    """Return how many samples of a run it takes until it has trained on so many tokens.

    Costs a few passes over the lengths of one epoch's samples, however many epochs that is.
    """
    whole = [
        sum(int(source.lengths(part).sum()) for part in _parts(0, len(source)))
        for source in mixture.sources
    ]
    epoch = _last_where(lambda epoch: _tokens_before(mixture, epoch, whole) < tokens)
    counted = _tokens_before(mixture, epoch, whole)
    samples = epoch * len(mixture)
    for positions in _parts(0, len(mixture)):
        order = all_permuted((mixture.seed, epoch), len(mixture), positions)
        totals = counted + np.cumsum(_lengths(mixture, epoch, order))
        if totals[-1] >= tokens:
            return samples + int(np.searchsorted(totals, tokens)) + 1
        counted, samples = int(totals[-1]), samples + len(positions)
    raise AssertionError("the epoch holds them")


def _last_where(holds: Callable[[int], bool]) -> int:
    """Return the last number from 0 on of which something holds, where it never holds again."""
    beyond = 1
    while holds(beyond):
        beyond *= 2
    low = beyond // 2 if beyond > 1 else 0
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if holds(middle) else (low, middle)
    return low


def _tokens_before(mixture: Mixture, epoch: int, whole: Sequence[int]) -> int:
    """Return the tokens of all samples before an epoch; ``whole`` are those of each source."""
    total = 0
    for source, (samples, quota) in enumerate(zip(mixture.sources, mixture.quotas, strict=True)):
        if not quota:
            continue
        # Of a weight that is no whole number the samples go round from epoch to epoch.
        rounds, rest = divmod(epoch * quota, len(samples))
        total += rounds * whole[source]
        total += sum(
            int(samples.lengths(mixture.in_turn(source, part)).sum()) for part in _parts(0, rest)
        )
    return total


def _lengths(mixture: Mixture, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens of an epoch's samples, by their numbers in it, unshuffled."""
    lengths = np.empty(len(indices), dtype=np.int64)
    first = 0
    for source, (samples, quota) in enumerate(zip(mixture.sources, mixture.quotas, strict=True)):
        mine = (indices >= first) & (indices < first + quota)
        if mine.any():
            numbers = mixture.numbers(source, epoch, indices[mine] - first)
            lengths[mine] = samples.lengths(numbers)
        first += quota
    return lengths


def _parts(begin: int, end: int) -> Iterator[NDArray[np.int64]]:
    for start in range(begin, end, AT_ONCE):
        yield np.arange(start, min(start + AT_ONCE, end))
