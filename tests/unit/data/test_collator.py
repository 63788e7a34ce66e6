"""Batches: aligned labels for clm; for mlm what is masked, with what, and how reproducibly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shardwright.train.config import MlmObjective
from shardwright.train.data.batches.collator import IGNORED, Collator, Masking
from shardwright.train.data.batches.sampler import SampleKey
from shardwright.train.data.batches.samples import Window
from shardwright.train.data.tokens.tokenizer import SpecialIds
from shardwright.train.model.documents import DocumentBounds

BOS, PAD, EOS, UNK, MASK = range(5)
SPECIAL = np.arange(5)
VOCABULARY = 1000
IDS = SpecialIds(begin=BOS, end=EOS, pad=PAD, mask=MASK)


def masking(seed: int = 0, **objective: object) -> Masking:
    return Masking(
        MlmObjective.model_validate({"kind": "mlm", **objective}),
        mask=MASK,
        special=SPECIAL,
        ordinary=np.arange(5, VOCABULARY),
        seed=seed,
    )


def window(length: int, seed: int = 0, word_starts: list[int] | None = None) -> Window:
    tokens = np.random.default_rng(seed).integers(5, VOCABULARY, size=length)
    return Window(tokens, None if word_starts is None else np.array(word_starts, dtype=np.uint8))


def test_causal_labels_are_the_next_tokens() -> None:
    collator = Collator(sequence_length=4, padded=False, ids=IDS, masking=None)
    batch = collator([(Window(np.arange(10, 15), None), SampleKey(0, 0))])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13]]
    assert batch["labels"].tolist() == [[11, 12, 13, 14]]
    assert set(batch) == {"input_ids", "labels"}


def test_short_causal_samples_are_padded() -> None:
    collator = Collator(sequence_length=8, padded=True, ids=IDS, masking=None)
    short, long = Window(np.array([7, 8, EOS]), None), Window(np.arange(10, 19), None)
    batch = collator([(short, SampleKey(0, 0)), (long, SampleKey(0, 1))])
    assert batch["input_ids"].tolist() == [[7, 8] + [PAD] * 6, list(range(10, 18))]
    assert batch["labels"].tolist() == [[8, EOS] + [IGNORED] * 6, list(range(11, 19))]
    assert batch["attention_mask"].tolist() == [[1, 1] + [0] * 6, [1] * 8]


@pytest.mark.parametrize(
    ("multiple", "length", "width"), [(1, 3, 3), (1, 9, 9), (4, 3, 4), (4, 9, 10), (10, 3, 10)]
)
def test_rows_are_padded_to_the_longest_of_the_batch(
    multiple: int, length: int, width: int
) -> None:
    collator = Collator(10, padded=True, ids=IDS, masking=None, width_multiple=multiple)
    lines = [Window(np.arange(10, 10 + n + 1), None) for n in (2, length)]
    batch = collator([(line, SampleKey(0, i)) for i, line in enumerate(lines)])
    assert {tensor.shape for tensor in batch.values()} == {(2, width)}
    assert batch["attention_mask"].sum(1).tolist() == [2, length]


def tells(form: Any = "numbers", first_position: int = 0) -> DocumentBounds:
    return DocumentBounds(form, longest=8, first_position=first_position)


def test_documents_of_a_causal_sample_are_told_apart() -> None:
    collator = Collator(8, padded=False, ids=IDS, masking=None, bounds=tells())
    first = Window(np.arange(10, 19), None, np.array([3, 5]))
    # A document that ends with the last token that is seen ends with the row.
    second = Window(np.arange(20, 29), None, np.array([8]))
    batch = collator([(first, SampleKey(0, 0)), (second, SampleKey(0, 1))])
    assert batch["input_ids"].tolist() == [list(range(10, 18)), list(range(20, 28))]
    assert batch["labels"].tolist() == [list(range(11, 19)), list(range(21, 29))]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))]
    assert batch["document_numbers"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [3] * 8]
    assert "attention_mask" not in batch


def test_the_frame_of_a_masked_sample_is_of_its_first_document_and_its_last() -> None:
    collator = Collator(
        10, padded=False, ids=IDS, masking=masking(), bounds=tells(first_position=2)
    )
    sample = window(8)._replace(document_ends=np.array([3, 4]))
    batch = collator([(sample, SampleKey(0, 0))])
    assert batch["input_ids"][0, [0, -1]].tolist() == [BOS, EOS]
    assert batch["position_ids"].tolist() == [[2, 3, 4, 5, 2, 2, 3, 4, 5, 6]]
    assert batch["document_numbers"].tolist() == [[0] * 4 + [1] + [2] * 5]


@pytest.mark.parametrize("mask", [None, masking(masking_rate=0.5)])
def test_lines_end_to_end_are_the_lines(mask: Masking | None) -> None:
    lines = [(window(n, seed=n), SampleKey(0, n)) for n in (3, 7, 2)]
    lines.append((window(4), SampleKey(0, 0, counted=False)))
    padded = Collator(10, padded=True, ids=IDS, masking=mask)(lines)
    batch = Collator(10, padded=True, ids=IDS, masking=mask, bounds=tells())(lines)
    seen = padded["attention_mask"].bool()
    for name in ("input_ids", "labels"):
        assert batch[name].tolist() == [padded[name][seen].tolist()]
    lengths = padded["attention_mask"].sum(1)
    numbers = torch.arange(4).repeat_interleave(lengths)
    assert batch["document_numbers"].tolist() == [numbers.tolist()]
    assert batch["position_ids"][0].tolist() == [i for n in lengths for i in range(n)]


def test_lines_that_no_token_is_seen_of_are_one_that_fills_up() -> None:
    collator = Collator(8, padded=True, ids=IDS, masking=None, bounds=tells())
    batch = collator([(Window(np.array([EOS]), None), SampleKey(0, 0))] * 2)
    assert batch["input_ids"].tolist() == [[PAD]]
    assert batch["labels"].tolist() == [[IGNORED]]
    assert batch["document_numbers"].tolist() == [[0]]


def test_masked_samples_are_framed() -> None:
    collator = Collator(sequence_length=10, padded=False, ids=IDS, masking=masking())
    batch = collator([(window(8, seed=i), SampleKey(0, i)) for i in range(50)])
    assert set(batch["input_ids"][:, 0].tolist()) == {BOS}
    assert set(batch["input_ids"][:, -1].tolist()) == {EOS}
    assert (batch["labels"][:, [0, -1]] == IGNORED).all()
    assert (batch["labels"] != IGNORED).any()


def test_short_masked_samples_are_padded_and_padding_is_never_predicted() -> None:
    collator = Collator(10, padded=True, ids=IDS, masking=masking(masking_rate=0.9))
    batch = collator([(window(3), SampleKey(0, i)) for i in range(50)])
    assert batch["attention_mask"].tolist() == [[1] * 5] * 50
    assert (batch["labels"][:, [0, -1]] == IGNORED).all()
    longer = collator([(window(n), SampleKey(0, i)) for i, n in enumerate((3, 8))])
    assert longer["attention_mask"].tolist() == [[1] * 5 + [0] * 5, [1] * 10]
    assert (longer["input_ids"][0, 5:] == PAD).all()
    assert (longer["labels"][0, 5:] == IGNORED).all()


def test_a_sample_that_only_fills_up_has_no_labels() -> None:
    for collator in (
        Collator(8, padded=False, ids=IDS, masking=None),
        Collator(11, padded=False, ids=IDS, masking=masking(masking_rate=0.9)),
    ):
        batch = collator(
            [(window(9), SampleKey(0, 0)), (window(9), SampleKey(0, 0, counted=False))]
        )
        assert (batch["labels"][0] != IGNORED).any()
        assert (batch["labels"][1] == IGNORED).all()


def test_labels_are_what_was_there() -> None:
    sample = window(500)
    ids, labels = masking()(sample, SampleKey(0, 0))
    chosen = labels != IGNORED
    assert (labels[chosen] == sample.tokens[chosen]).all()
    assert (ids[~chosen] == sample.tokens[~chosen]).all()


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_rate_and_split_are_as_asked_for(rate: float) -> None:
    sample = window(200_000)
    mask = masking(masking_rate=rate, mask_token_share=0.7, random_token_share=0.2)
    ids, labels = mask(sample, SampleKey(0, 0))
    chosen = labels != IGNORED
    masked, kept = ids[chosen] == MASK, ids[chosen] == sample.tokens[chosen]
    # Four standard deviations of a share of 200,000, and of 30,000, draws.
    assert chosen.mean() == pytest.approx(rate, abs=0.005)
    assert masked.mean() == pytest.approx(0.7, abs=0.012)
    # One of a thousand random tokens is the one that was there.
    assert kept.mean() == pytest.approx(0.1, abs=0.009)
    random = ids[chosen & (ids != MASK) & (ids != sample.tokens)]
    assert random.min() >= 5
    assert random.max() < VOCABULARY
    assert random.mean() == pytest.approx((5 + VOCABULARY) / 2, rel=0.03)


def test_special_tokens_are_never_masked_and_never_put_in() -> None:
    tokens = np.where(np.arange(10_000) % 2, EOS, 500)
    ids, labels = masking(masking_rate=0.9, random_token_share=0.2)(
        Window(tokens, None), SampleKey(0, 0)
    )
    assert (labels[tokens == EOS] == IGNORED).all()
    assert (ids[tokens == EOS] == EOS).all()
    assert not np.isin(ids[tokens == 500], [BOS, PAD, EOS, UNK]).any()


def test_whole_words_are_masked_together_at_the_same_rate() -> None:
    starts = [1, 0, 0, 1, 1, 0] * 20_000
    _, labels = masking(whole_word=True)(window(len(starts), word_starts=starts), SampleKey(0, 0))
    chosen = labels != IGNORED
    assert chosen.mean() == pytest.approx(0.15, abs=0.006)
    for word in np.split(chosen, np.flatnonzero(starts)[1:]):
        assert word.all() or not word.any()


def test_a_word_cut_by_the_windows_edge_is_a_word() -> None:
    starts = [0, 0, 1, 0]
    patterns = {
        tuple(masking(masking_rate=0.5)(window(4, word_starts=starts), SampleKey(0, i))[1] >= 0)
        for i in range(50)
    }
    assert patterns == {(a, a, b, b) for a in (True, False) for b in (True, False)}


def test_masks_depend_on_seed_epoch_and_sample_alone() -> None:
    sample = window(100)

    def mask_of(seed: int, epoch: int, number: int) -> bytes:
        return masking(seed)(sample, SampleKey(epoch, number))[0].tobytes()

    keys = [(s, e, n) for s in (0, 1, 2**32) for e in range(3) for n in range(3)]
    assert len({mask_of(*key) for key in keys}) == len(keys)
    assert [mask_of(*key) for key in keys] == [mask_of(*key) for key in keys]

    collator = Collator(102, padded=False, ids=IDS, masking=masking())
    alone = collator([(sample, SampleKey(2, 7))])["input_ids"][0]
    among = collator([(sample, SampleKey(2, n)) for n in range(10)])["input_ids"]
    assert (among[7] == alone).all()
