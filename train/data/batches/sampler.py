"""The order of samples: a function of seed, epoch and position, whatever the world size.

Each step consumes the positions that follow those of the one before, of an endless sequence of
epochs: as many as `BatchSizes` says. Nothing is listed or shuffled, so resuming at any position
costs the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardwright.train.config import BatchSizes
from shardwright.train.config.batches import part
from shardwright.train.data.batches.stages import Stages

_MASK64 = 2**64 - 1
_ROUNDS = 6


class SampleKey(NamedTuple):
    """Names one occurrence of a sample; masking is a function of it."""

    epoch: int
    sample: int
    """Which one of the epoch's samples, unshuffled."""
    counted: bool = True
    """False for one that only fills up the last batch of an evaluation."""
    held_out_set: int = 0
    """Of an evaluation, in which of its sets it is."""
    stage: int = 0
    """Of training, in which stage."""
    progress: float = 0.0
    """Of training, which share of the run is done before the sample's step; 0 where that changes
    nothing."""


def permuted(key: tuple[int, ...], size: int, position: int) -> int:
    """Return where a keyed permutation of range(size) takes ``position``.

    A Feistel network permutes the next even power of two, and cycle walking (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002) leads back into the range: fewer than four
    rounds of it on average from 64 on, in constant memory.
    """
    assert 0 <= position < size
    half_bits = max(3, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    round_keys = _round_keys(key)
    value = position
    while True:
        left, right = value >> half_bits, value & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & half_mask)
        value = left << half_bits | right
        if value < size:
            return value


def all_permuted(
    key: tuple[int, ...], size: int, positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return `permuted` of each position, shape (n,), a hundred times as fast."""
    half_bits = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    values = positions.astype(np.uint64)
    walking = np.ones(len(values), dtype=bool)
    while walking.any():
        left, right = values[walking] >> half_bits, values[walking] & half_mask
        for round_key in _round_keys(key):
            left, right = right, left ^ (_all_mixed(right ^ np.uint64(round_key)) & half_mask)
        values[walking] = left << half_bits | right
        walking &= values >= np.uint64(size)
    return values.astype(np.int64)


def sample_at(seed: int, samples_per_epoch: int, position: int, stage: int = 0) -> SampleKey:
    """Return the sample at a position of the endless sequence of shuffled epochs.

    Each stage of a run has a sequence of its own.
    """
    epoch, within = divmod(position, samples_per_epoch)
    key = (seed, epoch, stage) if stage else (seed, epoch)
    return SampleKey(epoch, permuted(key, samples_per_epoch, within), stage=stage)


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one rank, in order: ``steps`` x ``accumulation_steps`` of them.

    Micro-batch i of data-parallel rank r in a step takes the (i D + r)-th of accumulation x D parts
    of the step's samples, equal ones to within a sample. So a step has the same samples for every
    split of it, and the same micro-batches for every data-parallel size D. Ranks of one
    data-parallel rank get the same samples.
    """

    seed: int
    samples_per_epoch: int
    data_parallel_rank: int
    data_parallel_size: int
    batches: BatchSizes
    accumulation_steps: int
    steps: int
    start_sample: int = 0
    """Samples that were consumed before."""
    stages: Stages | None = None
    """None where the run has one stage alone, whose positions are its samples."""
    progress_after: Callable[[int], float] | None = None
    """Which share of the run is done after so many of these steps; None where samples need not
    tell."""

    def __len__(self) -> int:
        return self.steps * self.accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        position = self.start_sample
        for step in range(self.steps):
            progress = 0.0 if self.progress_after is None else self.progress_after(step)
            for within in self.parts(position):
                keys = (self._sample(position, i) for i in within)
                yield [key._replace(progress=progress) if progress else key for key in keys]
            position += self.batches.at(position)

    def parts(self, position: int) -> list[range]:
        """Return which samples of the step that begins at a position each micro-batch takes."""
        slots = self.accumulation_steps * self.data_parallel_size
        mine = range(self.data_parallel_rank, slots, self.data_parallel_size)
        size = self.batches.at(position)
        if self.stages is not None:
            size = self.stages.size(self.stages.at(position), size)
        return [part(size, slot, slots) for slot in mine]

    def _sample(self, position: int, number: int) -> SampleKey:
        """Return one of the samples of the step that begins at a position, counted from 0."""
        if self.stages is None:
            return sample_at(self.seed, self.samples_per_epoch, position + number)
        stage = self.stages.at(position)
        first, epoch = self.stages.first(stage, position), self.stages.samples_per_epoch[stage]
        return sample_at(self.seed, epoch, first + number, stage)


class Portion(NamedTuple):
    """What of a held-out set is evaluated: the first samples of it."""

    first: int
    """Number of the first one, by which it is masked."""
    samples: int


@dataclass(frozen=True)
class EvalBatches:
    """The batches of one rank: over all ranks each sample of each set once, in order.

    A batch has samples of one set. All ranks get as many batches of the same size, the last ones
    of a set filled up with samples that do not count.
    """

    portions: Sequence[Portion]
    """What of each set is evaluated."""
    data_parallel_rank: int
    data_parallel_size: int
    micro_batch_size: int

    def __len__(self) -> int:
        return sum(self._batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for number, (portion, batches) in enumerate(zip(self.portions, self._batches, strict=True)):
            filling = SampleKey(0, portion.first, counted=False, held_out_set=number)
            for batch in range(batches):
                part = batch * self.data_parallel_size + self.data_parallel_rank
                start = part * self.micro_batch_size
                yield [
                    SampleKey(0, portion.first + i, held_out_set=number)
                    if i < portion.samples
                    else filling
                    for i in range(start, start + self.micro_batch_size)
                ]

    def sets(self) -> Iterator[int]:
        """Yield for each batch of which set its samples are."""
        for number, batches in enumerate(self._batches):
            yield from [number] * batches

    @property
    def _batches(self) -> list[int]:
        at_once = self.micro_batch_size * self.data_parallel_size
        return [-(-portion.samples // at_once) for portion in self.portions]


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    text = ",".join(map(str, key)).encode()
    digest = hashlib.blake2b(text, digest_size=8 * _ROUNDS, person=b"sample order").digest()
    return tuple(int.from_bytes(digest[i : i + 8], "big") for i in range(0, len(digest), 8))


def _mix(value: int) -> int:
    """Mix 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31


def _all_mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `_mix` of each; products of uint64 wrap as they are to."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
