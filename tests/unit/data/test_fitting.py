"""Best-fit packing: what fits is whole, what is cut is all there, and rows are full."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.train.config import MlmObjective, RunConfig
from shardwright.train.data import prepare
from shardwright.train.data.batches.collator import IGNORED, PADDING, Collator, Masking
from shardwright.train.data.batches.fitted import FittedSamples, room_of
from shardwright.train.data.batches.sampler import SampleKey, sample_at
from shardwright.train.data.batches.samples import Mixture
from shardwright.train.data.prepare import noted_samples_wanted
from shardwright.train.data.tokens.counting import samples_of_tokens
from shardwright.train.data.tokens.fitting import (
    Limits,
    Room,
    Rows,
    Share,
    best_fit,
    cut_up,
    share_of,
    write_rows,
)
from shardwright.train.data.tokens.store import StoreWriter, TokenStore
from shardwright.train.data.tokens.tokenizer import SpecialIds
from shardwright.train.errors import UserError
from shardwright.train.loop.ahead import counted
from shardwright.train.model.documents import DocumentBounds

MakeConfig = Callable[..., RunConfig]
LENGTH = 8
DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def plainly(lengths: list[int], room: int) -> list[int]:
    """Return how full each row is, by looking at all rows for each length."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, filled in enumerate(rows) if filled + length <= room]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return sorted(rows)


@given(lengths=st.lists(st.integers(1, 30), max_size=80), room=st.integers(30, 50))
def test_each_goes_where_it_leaves_the_least_room(lengths: list[int], room: int) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), room)
    filled: Counter[int] = Counter()
    for row, length in zip(rows.tolist(), lengths, strict=True):
        filled[row] += length
    assert sorted(filled.values()) == plainly(lengths, room)


@given(lengths=DOCUMENTS, room=st.sampled_from([Room(9, 1), Room(6, 0), Room(41, 1)]))
def test_what_fits_is_whole_and_what_is_cut_is_all_there(lengths: list[int], room: Room) -> None:
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    pieces, of_documents = cut_up(ends - lengths, ends, room)
    for number, (length, end) in enumerate(zip(lengths, ends.tolist(), strict=True)):
        starts, stops = (part[of_documents == number].tolist() for part in pieces)
        assert starts[0] == end - length
        assert stops[-1] == end
        assert [stop - room.overlap for stop in stops[:-1]] == starts[1:]
        found = [stop - start for start, stop in zip(starts, stops, strict=True)]
        assert set(found[:-1]) <= {room.tokens}
        assert 0 < found[-1] <= room.tokens
        assert len(starts) == 1 or length > room.tokens


def fitted(
    directory: Path, lengths: list[int], *, causal: bool = True, limits: Limits | None = None
) -> FittedSamples:
    """Return the samples of documents of these lengths, whose tokens are 100, 101, ..."""
    directory.mkdir(exist_ok=True)
    tokens, ends = np.arange(sum(lengths)) + 100, np.cumsum(lengths)
    with StoreWriter(directory, "train-0", 2**16, True, lines=False, documents=True) as writer:
        writer.append(tokens, tokens % 2, ends)
    store, room = TokenStore(directory, "train-0"), room_of(LENGTH, causal=causal)
    write_rows(store, room, directory, "train-0", **({"limits": limits} if limits else {}))
    return FittedSamples(store, LENGTH, causal, Rows(directory, "train-0"))


@pytest.mark.parametrize("limits", [None, Limits(documents=7), Limits(tokens=30)])
@pytest.mark.parametrize("causal", [True, False])
def test_every_token_is_learned_once(tmp_path: Path, causal: bool, limits: Limits | None) -> None:
    lengths = [3, 9, 1, 25, 2, 2, 8, 10, 5, 4, 17, 6, 7, 3, 1, 33, 9, 2]
    samples = fitted(tmp_path / "store", lengths, causal=causal, limits=limits)
    begins = set((np.cumsum(lengths) - lengths + 100).tolist())
    collator = Collator(LENGTH, False, SpecialIds(1, 2, 0, 3), None, fills=True)
    learned: list[tuple[int, int]] = []
    seen: list[int] = []
    for index in range(len(samples)):
        window = samples[index]
        assert len(window.tokens) <= (LENGTH + 1 if causal else LENGTH - 2)
        assert window.word_starts is not None
        assert (window.word_starts == window.tokens % 2).all()
        seen += window.tokens.tolist()
        if causal:
            ids, labels = collator._row(window, SampleKey(0, index))
            pairs = zip(ids.tolist(), labels.tolist(), strict=True)
            learned += [(seen, label) for seen, label in pairs if label != IGNORED]
    assert set(seen) == set(range(100, 100 + sum(lengths)))
    within = {(t, t + 1) for t in range(100, 99 + sum(lengths)) if t + 1 not in begins}
    if causal:
        assert Counter(pair for pair in learned if pair in within) == Counter(within)
        assert {label for pair in learned if pair not in within for label in pair[1:]} <= begins
    else:
        assert len(seen) == len(set(seen))
    kept = samples.lengths(np.arange(len(samples)))
    windows = [samples[index] for index in range(len(samples))]
    assert kept.tolist() == [len(w.tokens) + (-1 if causal else 2) for w in windows]
    assert samples.extent() == (len(samples), sum(lengths), 0, 0, 0)


def test_documents_in_a_row_are_in_their_order_with_where_they_end(tmp_path: Path) -> None:
    samples = fitted(tmp_path / "store", [4, 2, 11, 5])
    # The third is cut after 9 tokens, the last of which begins its rest.
    found = [(s.tokens - 100).tolist() for s in map(samples.__getitem__, range(len(samples)))]
    assert found == [[0, 1, 2, 3, 17, 18, 19, 20, 21], [4, 5, 14, 15, 16], [*range(6, 15)]]
    ends = [samples[index].document_ends for index in range(3)]
    assert [[] if end is None else end.tolist() for end in ends] == [[4], [2], []]
    barred = [samples[index].not_predicted for index in range(3)]
    assert [[] if at is None else at.tolist() for at in barred] == [[], [2], []]
    again = pickle.loads(pickle.dumps(samples))
    assert again[1].tokens.tolist() == samples[1].tokens.tolist()


def test_no_documents_make_no_rows(tmp_path: Path) -> None:
    assert len(fitted(tmp_path / "store", [])) == 0


def test_what_is_cut_and_what_is_padding_is_counted(tmp_path: Path) -> None:
    samples = fitted(tmp_path / "store", [4, 2, 11, 5])
    counts = write_rows(samples.store, room_of(LENGTH, causal=True), tmp_path, "again")
    assert counts == (4, 1, 3, 23)
    share = share_of([counts], LENGTH, causal=True)
    assert share == Share(documents=4, longer=1, cut=0, padding=1 - 20 / 24)
    assert str(share) == (
        "1 of 4 documents (25.0%) are longer than a sample, and cut in any case; of the others 0 "
        "(0.0%) are cut, and 16.67% of the positions are padding"
    )


# --- batches --------------------------------------------------------------------------------------

PAD = 0


def batch_of(samples: FittedSamples, *, told: bool) -> dict[str, Any]:
    few = np.arange(4)
    masking = Masking(MlmObjective(kind="mlm"), mask=3, special=few, ordinary=few, seed=0)
    bounds = DocumentBounds("numbers", longest=LENGTH) if told else None
    ids = SpecialIds(begin=1, end=2, pad=PAD, mask=3)
    of = None if samples.causal else masking
    collator = Collator(LENGTH, False, ids, of, bounds=bounds, fills=True)
    return collator([(samples[index], SampleKey(0, index)) for index in range(len(samples))])


def test_what_is_free_in_a_causal_row_is_padding_that_nothing_learns(tmp_path: Path) -> None:
    batch = batch_of(fitted(tmp_path / "store", [4, 2, 11, 5]), told=False)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, LENGTH)
    assert batch["input_ids"][1].tolist() == [104, 105, 114, 115, PAD, PAD, PAD, PAD]
    nothing = [IGNORED] * 4
    assert batch["labels"][1].tolist() == [105, IGNORED, 115, 116, *nothing]
    assert set(batch) == {"input_ids", "labels", PADDING}
    assert counted([batch], IGNORED) == (19, 20)


def test_a_masked_model_gets_a_mask(tmp_path: Path) -> None:
    batch = batch_of(fitted(tmp_path / "store", [4, 2, 9], causal=False), told=False)
    assert batch["input_ids"].shape == (3, LENGTH)
    assert batch["attention_mask"].sum(1).tolist() == [8, 8, 5]
    assert counted([batch], IGNORED)[1] == 21


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_a_document_of_its_own(tmp_path: Path, causal: bool) -> None:
    lengths = [4, 2, 11, 5] if causal else [2, 1, 5]
    batch = batch_of(fitted(tmp_path / "store", lengths, causal=causal), told=True)
    assert {batch[name].shape[1] for name in ("input_ids", "labels", "position_ids")} == {LENGTH}
    numbers, positions = batch["document_numbers"], batch["position_ids"]
    padding = batch["input_ids"] == PAD
    assert int(padding.sum()) == batch[PADDING]
    assert set(numbers[padding].tolist()).isdisjoint(numbers[~padding].tolist())
    assert (batch["labels"][padding] == IGNORED).all()
    if causal:
        assert positions.tolist() == [
            [0, 1, 2, 3, 0, 1, 2, 3],
            [0, 1, 0, 1, 0, 1, 2, 3],
            [*range(8)],
        ]
    assert counted([batch], IGNORED)[1] == int((~padding).sum())


# --- a run's data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mlm", [False, True])
def test_a_run_is_told_what_each_packing_cuts(
    corpus: Path,
    make_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mlm: bool,
) -> None:
    """On tokens in which where documents end is kept, and on those in which it is not."""
    caplog.set_level("INFO", logger="shardwright.train")
    for path in corpus.iterdir():
        path.write_text(path.read_text()[: 40 + 14 * int(path.stem)])
    told = {}
    settings: dict[str, dict[str, Any]] = {
        "concatenate": {},
        "kept": {"document_attention": True},
        "best_fit": {"packing": "best_fit"},
    }
    for name, data in settings.items():
        (tmp_path / name).mkdir()
        caplog.clear()
        config = make_config(
            mlm=mlm,
            data={"sequence_length": 64, **data},
            trainer={"max_steps": 5, "global_batch_size": 4, "micro_batch_size": 2},
        )
        prepared = prepare(config, tmp_path / name)
        (line,) = [m for m in caplog.messages if m.startswith("data.packing=")]
        found = re.fullmatch(
            r"data\.packing=(\w+): (\d+) of (\d+) documents \(.*%\) are longer than a sample, and "
            r"cut in any case; of the others (\d+) \(.*%\) are cut, and (.*)% of the .*",
            line,
        )
        assert found
        assert found[1] == config.data.packing
        assert int(found[3]) == prepared.training.documents
        told[name] = int(found[2]), int(found[4]), float(found[5])
    # By another way: documents of the store with all their tokens, against the samples' windows.
    store = prepared.train.sources[0].store
    ends = store.document_ends.tolist()
    room = 62 if mlm else 65
    stride = 62 if mlm else 64
    long = crossing = 0
    for start, end in zip([0, *ends], ends, strict=False):
        long += end - start > room
        crossing += not any(
            sample * stride <= start and end <= sample * stride + room
            for sample in range(start // stride + 1)
        )
    assert told["best_fit"][:2] == (long, 0)
    assert told["concatenate"] == told["kept"] == (long, crossing - long, 0)
    assert 0 < long < crossing
    assert 0 < told["best_fit"][2] < 10


def test_tokens_that_are_fitted_are_those_that_keep_ends(
    corpus: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    stores = []
    for number, data in enumerate(
        [{"packing": "best_fit"}, {"document_attention": True}, {"packing": "best_fit"}]
    ):
        run_dir = tmp_path / f"run-{number}"
        run_dir.mkdir()
        stores.append(prepare(make_config(data=data), run_dir).train.sources[0])
    assert len({samples.store.directory for samples in stores}) == 1
    assert isinstance(stores[0], FittedSamples)
    assert not isinstance(stores[1], FittedSamples)
    assert len([*(tmp_path / "cache/rows").glob("*/index.json")]) == 1


def test_a_number_of_tokens_is_counted_in_the_order_of_rows(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    for path in corpus.iterdir():
        path.write_text(path.read_text()[: 100 + 9 * int(path.stem)])
    length = {"max_steps": None, "max_tokens": 3000, "global_batch_size": 8}
    config = make_config(data={"packing": "best_fit"}, trainer=length)
    prepared = prepare(config, run_dir)
    samples, found, tokens = prepared.train.sources[0], 0, 0
    while tokens < 3000:
        key = sample_at(0, len(samples), found)
        tokens += len(samples[key.sample].tokens) - 1
        found += 1
    assert prepared.samples_of_max_tokens == found == noted_samples_wanted(config, run_dir)
    assert samples_of_tokens(Mixture([samples], (1.0,), 0), 3000) == found


def test_lines_are_not_packed(make_config: MakeConfig) -> None:
    with pytest.raises(
        UserError,
        match="data.packing=best_fit puts documents into samples together, but "
        "data.line_by_line=true makes each line a sample; leave one of them out",
    ):
        make_config(data={"packing": "best_fit", "line_by_line": True})
    with pytest.raises(UserError, match="data.packing=tight: must be concatenate or best_fit"):
        make_config(data={"packing": "tight"})


def test_batches_are_tensors_of_whole_numbers(tmp_path: Path) -> None:
    batch = batch_of(fitted(tmp_path / "store", [4, 2, 11, 5]), told=True)
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels"))
