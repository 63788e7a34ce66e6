"""How many samples hold a number of tokens, where lines differ in length."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from shardwright.train.config import MlmObjective
from shardwright.train.data.batches.collator import Collator, Masking
from shardwright.train.data.batches.sampler import SampleKey, all_permuted, permuted, sample_at
from shardwright.train.data.batches.samples import Mixture, Samples
from shardwright.train.data.tokens import counting
from shardwright.train.data.tokens.counting import samples_of_tokens
from shardwright.train.data.tokens.store import StoreWriter, TokenStore
from shardwright.train.data.tokens.tokenizer import SpecialIds

LENGTH = 16


def line_samples(directory: Path, lengths: list[int], *, causal: bool) -> Samples:
    directory.mkdir()
    with StoreWriter(directory, "train-0", 2**16, words=False, lines=True) as writer:
        writer.append(list(range(sum(lengths))), [], np.cumsum(lengths).tolist())
    return Samples(TokenStore(directory, "train-0"), LENGTH, causal)


@pytest.fixture(params=[True, False], ids=["clm", "mlm"])
def sources(tmp_path: Path, request: pytest.FixtureRequest) -> list[Samples]:
    draw = random.Random(0)
    # Some are shorter than a sample, some are cut.
    return [
        line_samples(
            tmp_path / str(i), [draw.randint(2, 40) for _ in range(count)], causal=request.param
        )
        for i, count in enumerate((30, 17))
    ]


def trained_on(samples: Samples, number: int) -> int:
    """Return what a batch counts of a sample."""
    few = np.arange(4)
    masking = Masking(MlmObjective(kind="mlm"), mask=3, special=few, ordinary=few, seed=0)
    collator = Collator(LENGTH, True, SpecialIds(1, 2, 0, 3), None if samples.causal else masking)
    return int(collator([(samples[number], SampleKey(0, number))])["attention_mask"].sum())


@pytest.mark.parametrize("size", [1, 2, 5, 64, 65, 1000, 2**33 + 7])
def test_many_are_permuted_as_one_is(size: int) -> None:
    positions = np.unique(np.linspace(0, size - 1, 200).astype(np.int64))
    assert all_permuted((3, 5), size, positions).tolist() == [
        permuted((3, 5), size, int(position)) for position in positions
    ]


def test_a_length_is_what_a_batch_counts(sources: list[Samples]) -> None:
    for samples in sources:
        numbers = range(len(samples))
        found = samples.lengths(np.array(numbers))
        assert found.tolist() == [trained_on(samples, number) for number in numbers]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), (0.37, 1.6)])
@pytest.mark.parametrize("at_once", [2**20, 7])
def test_the_last_sample_is_the_one_that_reaches_the_tokens(
    sources: list[Samples],
    weights: tuple[float, float],
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counting, "AT_ONCE", at_once)
    mixture = Mixture(sources, weights, seed=9)
    total, reached = 0, []
    for position in range(4 * len(mixture)):
        key = sample_at(9, len(mixture), position)
        source, number = mixture.locate(key.epoch, key.sample)
        total += trained_on(sources[source], number)
        reached.append(total)
    for tokens in [1, reached[0], reached[0] + 1, *range(50, reached[-1], 97), reached[-1]]:
        expected = next(i for i, count in enumerate(reached) if count >= tokens) + 1
        assert samples_of_tokens(mixture, tokens) == expected
