"""Samples: which tokens each one has, and which samples make up an epoch."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shardwright.train.data.batches.samples import Mixture, Samples
from shardwright.train.data.tokens.store import StoreWriter, TokenStore


def store_of(directory: Path, tokens: list[int], lines: list[int] | None = None) -> TokenStore:
    with StoreWriter(directory, "train-0", 2**16, words=True, lines=lines is not None) as writer:
        writer.append(tokens, [token % 2 for token in tokens], lines or [])
    return TokenStore(directory, "train-0")


def test_causal_samples_predict_each_token_but_the_first_once(tmp_path: Path) -> None:
    samples = Samples(store_of(tmp_path, list(range(30))), sequence_length=8, causal=True)
    assert len(samples) == 3
    assert [samples[i].tokens.tolist() for i in range(3)] == [
        list(range(0, 9)),
        list(range(8, 17)),
        list(range(16, 25)),
    ]


def test_masked_samples_leave_room_for_their_frame(tmp_path: Path) -> None:
    samples = Samples(store_of(tmp_path, list(range(20))), sequence_length=8, causal=False)
    assert len(samples) == 3
    window = samples[2]
    assert window.tokens.tolist() == list(range(12, 18))
    assert window.tokens.dtype == np.int64
    assert window.word_starts is not None
    assert window.word_starts.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("causal", "ends"), [(True, [[4], [1, 3], [2]]), (False, [[4], [3, 5], []])]
)
def test_samples_know_where_documents_end_within_them(
    tmp_path: Path, causal: bool, ends: list[list[int]]
) -> None:
    with StoreWriter(tmp_path, "train-0", 99, words=False, lines=False, documents=True) as writer:
        writer.append(range(10), [], [4])
        writer.append(range(10, 30), [], [-1, 1, 8, 20])
    samples = Samples(TokenStore(tmp_path, "train-0"), sequence_length=8, causal=causal)
    found = [samples[i].document_ends for i in range(3)]
    assert [e if e is None else e.tolist() for e in found] == ends


@pytest.mark.parametrize(
    ("tokens", "causal", "count"), [(8, 1, 0), (9, 1, 1), (5, 0, 0), (6, 0, 1)]
)
def test_what_is_left_over_makes_no_sample(
    tmp_path: Path, tokens: int, causal: int, count: int
) -> None:
    samples = Samples(store_of(tmp_path, list(range(tokens))), 8, causal=bool(causal))
    assert len(samples) == count


def test_an_empty_store_has_no_samples(tmp_path: Path) -> None:
    store = store_of(tmp_path, [])
    assert [len(Samples(store, 8, causal)) for causal in (True, False)] == [0, 0]


def test_line_samples_are_cut_and_keep_their_end_for_clm_alone(tmp_path: Path) -> None:
    end = 99
    store = store_of(tmp_path, [1, 2, end, *range(10, 30), end], lines=[3, 24])
    causal = Samples(store, sequence_length=8, causal=True)
    masked = Samples(store, sequence_length=8, causal=False)
    assert [causal[i].tokens.tolist() for i in range(2)] == [[1, 2, end], list(range(10, 19))]
    assert [masked[i].tokens.tolist() for i in range(2)] == [[1, 2], list(range(10, 16))]


def test_an_epoch_has_each_sample_as_often_as_its_weight() -> None:
    mixture = Mixture([range(10), range(5)], (1.0, 3.0), seed=0)
    assert len(mixture) == 25
    seen = Counter(mixture.locate(0, i) for i in range(25))
    assert seen == {(0, i): 1 for i in range(10)} | {(1, i): 3 for i in range(5)}


def test_fractional_weights_go_on_in_the_next_epoch() -> None:
    mixture = Mixture([range(10)], (0.3,), seed=0)
    assert len(mixture) == 3
    epochs = [[mixture.get(epoch, i) for i in range(3)] for epoch in range(10)]
    assert all(len(set(epoch)) == 3 for epoch in epochs)
    assert not set(epochs[0]) & set(epochs[1])
    assert Counter(itertools.chain(*epochs)) == dict.fromkeys(range(10), 3)
    assert epochs[0] != [0, 1, 2], "a part of the corpus, not its beginning"


def test_a_weight_above_one_and_a_half_repeats_some() -> None:
    mixture = Mixture([range(10)], (1.5,), seed=0)
    seen = Counter(mixture.get(0, i) for i in range(15))
    assert sorted(seen.values()) == [1] * 5 + [2] * 5


def test_a_source_with_a_tiny_weight_is_not_lost() -> None:
    assert Mixture([range(10), range(0)], (0.001, 1.0), seed=0).quotas == (1, 0)
