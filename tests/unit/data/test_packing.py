"""Packing: what lies in the token stores, and that memory does not grow with the corpus."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens import packing, workers
from shardwright.train.data.tokens.encoding import Encoder, Packing
from shardwright.train.data.tokens.packing import BATCH_TEXTS, pack
from shardwright.train.data.tokens.store import StoreWriter, TokenStore
from shardwright.train.data.tokens.training import train_byte_bpe
from shardwright.train.data.tokens.words import word_starts

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
END = 2
PLAIN = Packing(
    vocabulary_size=400,
    prefix=(),
    suffix=(END,),
    control=(0, 1, 2, 3, 4),
    words=False,
    by_line=False,
)


@pytest.fixture
def bpe(sentences: Callable[..., str]) -> Tokenizer:
    return train_byte_bpe([sentences(200)], 400, 2, SPECIAL)


def document(text: str, source: int = 0, held_out: bool = False) -> Piece:
    return Piece(text, begins=True, ends=True, source=source, held_out=held_out)


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the text of each word that ``word_starts`` finds."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    words: list[list[int]] = []
    for start, token in zip(word_starts(text, encoding), encoding.ids, strict=True):
        if start:
            words.append([])
        words[-1].append(token)
    return [tokenizer.decode(word) for word in words]


def test_documents_are_joined_by_their_end(bpe: Tokenizer, tmp_path: Path) -> None:
    counts = pack([document("pure reason"), document("time")], 1, bpe, PLAIN, tmp_path)
    tokens = TokenStore(tmp_path, "train-0").tokens
    assert tokens.dtype == np.uint16
    assert bpe.decode(tokens.tolist(), skip_special_tokens=False) == "pure reason</s>time</s>"
    assert counts == {
        "documents": 2,
        "tokens": len(tokens),
        "heldout_documents": 0,
        "heldout_tokens": 0,
        "encoder": mock.ANY,
    }


def test_documents_begin_with_the_prefix(bpe: Tokenizer, tmp_path: Path) -> None:
    pack(
        [document("pure"), document("time")],
        1,
        bpe,
        dataclasses.replace(PLAIN, prefix=(0,)),
        tmp_path,
    )
    tokens = TokenStore(tmp_path, "train-0").tokens.tolist()
    assert bpe.decode(tokens, skip_special_tokens=False) == "<s>pure</s><s>time</s>"


def test_pieces_of_a_document_are_joined_by_nothing(bpe: Tokenizer, tmp_path: Path) -> None:
    pieces = [Piece("pure\n", True, False, 0, False), Piece("time", False, True, 0, False)]
    counts = pack(pieces, 1, bpe, dataclasses.replace(PLAIN, prefix=(0,)), tmp_path)
    tokens = TokenStore(tmp_path, "train-0").tokens.tolist()
    assert bpe.decode(tokens, skip_special_tokens=False) == "<s>pure\ntime</s>"
    assert counts["documents"] == 1


def test_sources_and_splits_are_kept_apart(bpe: Tokenizer, tmp_path: Path) -> None:
    pieces = [document("pure", source=1), document("time", source=1, held_out=True)]
    counts = pack(pieces, 2, bpe, PLAIN, tmp_path)
    texts = {
        name: bpe.decode(TokenStore(tmp_path, name).tokens.tolist())
        for name in ("train-0", "train-1", "heldout-0", "heldout-1")
    }
    assert texts == {"train-0": "", "train-1": "pure", "heldout-0": "", "heldout-1": "time"}
    assert counts["heldout_documents"] == 1


def test_a_special_token_in_a_text_stays_text(bpe: Tokenizer, tmp_path: Path) -> None:
    pack([document("<s> pure </s> <mask>")], 1, bpe, PLAIN, tmp_path)
    tokens = TokenStore(tmp_path, "train-0").tokens.tolist()
    assert [token for token in tokens if token < len(SPECIAL)] == [END]
    assert bpe.decode(tokens) == "<s> pure </s> <mask>"
    assert bpe.encode("<mask>").ids == [4]


def test_lines_are_kept_apart_and_empty_ones_left_out(bpe: Tokenizer, tmp_path: Path) -> None:
    packing = dataclasses.replace(PLAIN, by_line=True)
    pack([document("pure reason\n\n  \ntime"), document("law")], 1, bpe, packing, tmp_path)
    store = TokenStore(tmp_path, "train-0")
    assert store.line_ends is not None
    lines = np.split(store.tokens, store.line_ends[:-1])
    assert all(line[-1] == END for line in lines)
    assert [bpe.decode(line[:-1].tolist()) for line in lines] == ["pure reason", "time", "law"]


def test_lines_of_a_document_in_pieces_are_whole(bpe: Tokenizer, tmp_path: Path) -> None:
    pieces = [
        Piece("pure reason\n\n ", True, False, 0, False),
        Piece(" of\ntime and", False, False, 0, False),
        Piece(" law\n  ", False, False, 0, False),
        Piece("\n", False, True, 0, False),
        document("space"),
    ]
    counts = pack(pieces, 1, bpe, dataclasses.replace(PLAIN, by_line=True, prefix=(0,)), tmp_path)
    store = TokenStore(tmp_path, "train-0")
    assert store.line_ends is not None
    lines = np.split(store.tokens, store.line_ends[:-1])
    assert [bpe.decode(line.tolist(), skip_special_tokens=False) for line in lines] == [
        f"<s>{text}</s>" for text in ("pure reason", "  of", "time and law", "space")
    ]
    assert counts["documents"] == 2


def test_ends_of_documents_are_kept_over_pieces_and_batches(bpe: Tokenizer, tmp_path: Path) -> None:
    pieces = [
        Piece("pure </s>", True, False, 0, False),
        Piece(" reason\n", False, True, 0, False),
        *(document("law") for _ in range(BATCH_TEXTS)),
    ]
    # A tokenizer that puts the same around a text on both sides: ids alone would not tell.
    packing = dataclasses.replace(PLAIN, documents=True, prefix=(END,))
    pack(pieces, 1, bpe, packing, tmp_path)
    store = TokenStore(tmp_path, "train-0")
    assert store.line_ends is None
    assert store.document_ends is not None
    texts = np.split(store.tokens, store.document_ends[:-1])
    assert {(t[0], t[-1]) for t in texts} == {(END, END)}
    assert [bpe.decode(t.tolist()) for t in texts[:2]] == ["pure </s> reason\n", "law"]
    assert len(texts) == BATCH_TEXTS + 1


def test_line_ends_count_on_over_batches(bpe: Tokenizer, tmp_path: Path) -> None:
    lines = 2 * BATCH_TEXTS + 10
    pack([document("pure\n" * lines)], 1, bpe, dataclasses.replace(PLAIN, by_line=True), tmp_path)
    store = TokenStore(tmp_path, "train-0")
    assert store.line_ends is not None
    assert len(store.line_ends) == lines
    assert (np.diff(store.line_ends, prepend=0) == len(bpe.encode("pure").ids) + 1).all()


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        (tmp_path / str(size)).mkdir()
        with StoreWriter(tmp_path / str(size), "train-0", size, words=False, lines=False) as writer:
            ids, nothing = np.array([0, size - 1]), np.array([], dtype=np.int64)
            writer.append(ids, nothing.astype(np.uint8), nothing)
        store = TokenStore(tmp_path / str(size), "train-0")
        assert store.tokens.dtype == dtype
        assert store.tokens.tolist() == [0, size - 1]


def test_a_store_pickles_as_its_name(bpe: Tokenizer, tmp_path: Path) -> None:
    pack([document("pure reason " * 1000)], 1, bpe, PLAIN, tmp_path)
    store = TokenStore(tmp_path, "train-0")
    assert len(store.tokens) > 1000
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    assert (pickle.loads(pickled).tokens == store.tokens).all()


def test_words_are_kept_with_the_tokens(bpe: Tokenizer, tmp_path: Path) -> None:
    packing = dataclasses.replace(PLAIN, words=True, prefix=(0,))
    pack([document("unreasonable time")], 1, bpe, packing, tmp_path)
    store = TokenStore(tmp_path, "train-0")
    assert store.word_starts is not None
    words = np.split(store.tokens, np.flatnonzero(store.word_starts)[1:])
    decoded = [bpe.decode(word.tolist(), skip_special_tokens=False) for word in words]
    assert decoded == ["<s>", "unreasonable", " time", "</s>"]
    assert len(words[1]) > 1


def test_words_of_a_byte_bpe_keep_letters_of_several_bytes_whole(bpe: Tokenizer) -> None:
    text = "žluťoučký  kůň, 漢字 reason's"
    expected = ["žluťoučký", " ", " kůň", ",", " 漢字", " reason", "'s"]
    assert words_of(bpe, text) == expected
    # Offsets may or may not leave out the space before a word.
    for trim in (True, False):
        bpe.post_processor = processors.ByteLevel(trim_offsets=trim)
        assert words_of(bpe, text) == expected


def test_words_of_a_wordpiece_tokenizer(wordpiece: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(wordpiece).backend_tokenizer
    text = "The understanding, unconditional."
    encoding = tokenizer.encode(text, add_special_tokens=False)
    starts = word_starts(text, encoding)
    assert len(starts) > 5
    for token, start in zip(encoding.tokens, starts, strict=True):
        assert start == (not token.startswith("##"))
    assert sum(starts) == 5


def test_words_of_a_tokenizer_that_splits_nothing_beforehand(
    sentences: Callable[..., str],
) -> None:
    # As Llama's: one "word" throughout, were it for the pre-tokenizer alone.
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>"], show_progress=False, max_token_length=6
    )
    tokenizer.train_from_iterator([s + "." for s in sentences(50).split(". ")], trainer)
    text = "pure reason of understanding"
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert set(encoding.word_ids) == {0}
    assert len(encoding.ids) > 4
    starts = word_starts(text, encoding)
    assert starts[0] == 1
    for token, start in list(zip(encoding.tokens, starts, strict=True))[1:]:
        assert start == token.startswith("▁")


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("vocab_size", [261, 400])
def test_words_of_bytes_that_are_not_split_beforehand(
    sentences: Callable[..., str], vocab_size: int, trim_offsets: bool
) -> None:
    tokenizer = train_byte_bpe([sentences(200)], vocab_size, 2, SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    text = "é\u3000漢字 flight,  easier"
    assert set(tokenizer.encode(text).word_ids) == {0}
    assert words_of(tokenizer, text) == ["é", "\u3000漢字", " flight,", "  easier"]


def test_a_text_without_tokens_has_no_words() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert word_starts(" ", tokenizer.encode(" ")).tolist() == []


def test_packing_reads_on_only_when_a_batch_is_written(bpe: Tokenizer, tmp_path: Path) -> None:
    read = 0

    def pieces() -> Iterator[Piece]:
        nonlocal read
        for _ in range(3 * BATCH_TEXTS):
            read += 1
            yield document("time")
        written = (tmp_path / "train-0.uint16").stat().st_size
        assert written > 2 * BATCH_TEXTS, "three batches read and two not yet written"

    pack(pieces(), 1, bpe, PLAIN, tmp_path)
    assert read == 3 * BATCH_TEXTS


def test_memory_does_not_grow_with_the_corpus(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    code = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens.encoding import Packing
from shardwright.train.data.tokens.packing import pack
from shardwright.train.process.memory import peak_resident_bytes
folder = Path(sys.argv[1])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
text = "pure reason of understanding, and the moral law. " * 400
def peak_after(documents):
    out = folder / str(documents); out.mkdir()
    pieces = (Piece(text, True, True, 0, False) for _ in range(documents))
    pack(pieces, 1, tokenizer, Packing(400, (), (2,), (), False, False), out)
    return peak_resident_bytes()
print(peak_after(60), peak_after(900))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    small, large = map(int, done.stdout.split())
    # Even 60 documents fill a batch; the ids alone of 840 more are about 210 MB as Python has them.
    assert large - small < 64 * 2**20


@pytest.mark.parametrize("by_line", [False, True])
def test_a_large_corpus_is_packed_by_processes_into_the_same_stores(
    by_line: bool, bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where ranks are forbidden threads, and keep to one core of the node's."""
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(packing, "SIDE_BY_SIDE_FROM_CHARACTERS", 4000)
    settings = dataclasses.replace(PLAIN, words=True, by_line=by_line)
    started = mock.Mock(side_effect=subprocess.Popen)
    monkeypatch.setattr(workers.subprocess, "Popen", started)

    def pieces() -> Iterator[Piece]:
        for i in range(60):
            yield document(f"</s> pure\n\nreason {i} " * 30, source=i % 2, held_out=i % 7 == 0)

    counts = {}
    core = min(os.sched_getaffinity(0))
    for cores in ({core}, {core, core + 1, core + 2}):
        (tmp_path / str(len(cores))).mkdir()
        # Cores that this machine lacks are ignored by the kernel.
        counts[len(cores)] = pack(pieces(), 2, bpe, settings, tmp_path / str(len(cores)), cores)
    assert started.call_count == 3
    assert counts[1] == counts[3]
    files = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "3").iterdir()}
    assert sum(map(len, files.values())) > 10_000


def test_a_worker_that_is_killed_is_an_error_and_leaves_no_other(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(workers, "subprocess", mock.Mock(Popen=start, PIPE=subprocess.PIPE))

    def batches() -> Iterator[list[Piece]]:
        yield [document("pure")]
        started[0].kill()
        while True:
            yield [document("reason")]

    cores = sorted(os.sched_getaffinity(0))[:1] * 2
    with pytest.raises(RuntimeError, match=r"tokenises the corpus has ended \(killed by SIGKILL\)"):
        list(workers.encoded(batches(), Encoder.of_corpus(bpe, PLAIN), cores))
    assert all(process.returncode is not None for process in started)


def test_every_piece_is_counted_once(bpe: Tokenizer, tmp_path: Path) -> None:
    def pieces() -> Iterable[Piece]:
        for i in range(1000):
            yield document(f"time {i}", held_out=i % 10 == 0)

    counts = pack(pieces(), 1, bpe, PLAIN, tmp_path)
    assert (counts["documents"], counts["heldout_documents"]) == (900, 100)
    assert counts["tokens"] == len(TokenStore(tmp_path, "train-0").tokens)
    assert counts["heldout_tokens"] == len(TokenStore(tmp_path, "heldout-0").tokens)
