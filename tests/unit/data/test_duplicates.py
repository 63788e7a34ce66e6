"""Exact deduplication: the same stores as of a corpus that never had the duplicates."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shardwright.launchers.__main__ import main
from shardwright.train.config import RunConfig, to_yaml
from shardwright.train.config.data import TextData, TokensData
from shardwright.train.data import prepare
from shardwright.train.data.prepare import summary
from shardwright.train.data.sources import shards as of_corpus
from shardwright.train.data.sources.corpus import Piece, read_corpus, shards_of
from shardwright.train.data.sources.files.pieces import PIECE_BYTES
from shardwright.train.data.sources.source import Reading
from shardwright.train.data.tokens import duplicates, packing, shard_workers
from shardwright.train.data.tokens.duplicates import (
    FILE,
    RECORD,
    Recorder,
    extend,
    first_ones,
    lines_in,
    records_of,
)
from shardwright.train.data.tokens.encoding import Packing
from shardwright.train.data.tokens.packing import _by_line
from shardwright.train.data.tokens.shards import Work
from shardwright.train.data.tokens.store import StoreWriter
from shardwright.train.data.tokens.training import train_byte_bpe
from shardwright.train.data.upkeep import show

MakeConfig = Callable[..., RunConfig]


def pieces(texts: Iterable[str], size: int = 10**9, source: int = 0) -> Iterator[Piece]:
    for text in texts:
        parts = [text[i : i + size] for i in range(0, len(text), size)] or [""]
        for n, part in enumerate(parts):
            yield Piece(part, n == 0, n == len(parts) - 1, source, held_out=False)


def recorded(directory: Path, *streams: Iterable[Piece], by_line: bool = False) -> Path:
    directory.mkdir(exist_ok=True)
    with Recorder(directory, by_line=by_line) as recorder:
        for stream in streams:
            for _ in recorder.passing(stream):
                pass
    return directory


def test_a_document_is_the_same_in_whatever_pieces_it_comes(tmp_path: Path) -> None:
    texts = ["abc" * 50, "abc" * 50 + "d", "é😀" * 30]
    for size in (1, 7, 1000):
        recorded(tmp_path / str(size), pieces(texts, size))
    files = [(tmp_path / str(size) / FILE).read_bytes() for size in (1, 7, 1000)]
    assert files[0] == files[1] == files[2]
    assert len(files[0]) == 3 * RECORD.itemsize
    assert len({row.tobytes()[:16] for row in np.frombuffer(files[0], RECORD)}) == 3


def test_the_first_one_stays_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    first = recorded(tmp_path / "0", pieces(["a", "b", "a"]), pieces(["b", "c"], source=1))
    second = recorded(tmp_path / "1", pieces(["c", "d", "d"], source=1))
    kept = [flags.tolist() for flags in first_ones([first, second])]
    assert kept == [[True, True, False, False, True], [False, True, False]]
    empty = recorded(tmp_path / "2", pieces([]))
    assert [len(flags) for flags in first_ones([empty, second, empty])] == [0, 3, 0]
    assert [len(flags) for flags in first_ones([empty])] == [0]


@pytest.mark.parametrize("at_once", [1, 5, 64, 2**22])
def test_the_hashes_may_be_sorted_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(duplicates, "MOST_AT_ONCE", at_once)
    monkeypatch.setattr(duplicates, "RECORDS_AT_ONCE", 7)
    draw = random.Random(0)
    texts = [[str(draw.randrange(40)) for _ in range(30)] for _ in range(3)]
    directories = [recorded(tmp_path / str(i), pieces(some)) for i, some in enumerate(texts)]
    seen: set[str] = set()
    expected = [[not (t in seen or seen.add(t)) for t in some] for some in texts]  # type: ignore[func-returns-value]
    assert [flags.tolist() for flags in first_ones(directories)] == expected
    assert any(False in flags for flags in expected)


@given(
    texts=st.lists(st.text("a \n\t\u2003\x1c", min_size=1, max_size=12), max_size=6),
    size=st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_lines_are_counted_as_they_are_stored(texts: list[str], size: int) -> None:
    for text in texts:
        stored = sum(piece.ends for piece in _by_line(pieces([text], size)))
        count, is_open = 0, False
        for piece in pieces([text], size):
            lines, is_open = lines_in(piece, is_open)
            count += lines
        assert count == stored


@pytest.mark.parametrize("at_once", [1, 3, 2**22])
@pytest.mark.parametrize("lines", [False, True])
def test_what_is_kept_is_copied_with_its_ends_and_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, lines: bool
) -> None:
    monkeypatch.setattr(duplicates, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(duplicates, "RECORDS_AT_ONCE", 2)
    texts = ["a\nb", "a", "a\nb", "\n \n", "c\n\nd", "a", "e"]
    whole = recorded(tmp_path / "whole", pieces(texts), by_line=lines)
    units = np.concatenate([r["units"] for r in records_of(whole)])
    assert units.tolist() == ([2, 1, 2, 0, 2, 1, 1] if lines else [1] * 7)

    def write(directory: Path, numbers: Iterable[int]) -> None:
        directory.mkdir(exist_ok=True)
        with StoreWriter(directory, "train-0", 9, True, lines=lines, documents=not lines) as to:
            for number in numbers:
                for unit in range(units[number]):
                    ids = [number] * (unit + 2)
                    to.append(ids, [unit] * len(ids), [len(ids)])

    write(whole, range(7))
    write(tmp_path / "expected", (0, 1, 3, 4, 6))
    (kept,) = first_ones([whole])
    (tmp_path / "found").mkdir()
    with StoreWriter(
        tmp_path / "found", "train-0", 9, True, lines=lines, documents=not lines
    ) as writer:
        documents, dropped = extend(writer, whole, "train-0", (False, 0), kept)
    assert (documents, dropped.documents) == (5, 2)
    assert dropped.tokens == (5 + 2 if lines else 2 + 2)
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "found" / path.name).read_bytes() == path.read_bytes(), path.name


# --- of a whole corpus ----------------------------------------------------------------------------

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
FRAMED: dict[str, Any] = {"prefix": (0,), "suffix": (2,), "control": (0, 1, 2)}


@pytest.fixture
def bpe(sentences: Callable[..., str]) -> Tokenizer:
    return train_byte_bpe([sentences(200)], 400, 2, SPECIAL)


def corpora(
    folder: Path, sentences: Callable[..., str], *, lines_are_documents: bool
) -> list[TextData]:
    """Write a corpus of two sources and four files, and the same without its duplicates."""
    draw = random.Random(1)
    rows = [sentences(draw.randrange(1, 6), seed=draw.randrange(60)) for _ in range(180)]
    rows[7] = rows[90] = "".join(f"{sentences(400, seed=n)}\n" for n in range(16))
    assert len(rows[7]) > PIECE_BYTES
    rows[11] = f"{rows[7]}\nand more"
    texts = [sentences(3, seed=n) for n in (900, 5, 900, 901)]
    found = []
    for unique in (False, True):
        seen: set[str] = set()

        def first(text: str, unique: bool = unique, seen: set[str] = seen) -> bool:
            is_first = text not in seen
            seen.add(text)
            return is_first or not unique

        directory = folder / f"unique-{unique}"
        directory.mkdir()
        for part in range(3):
            some = [row for row in rows[part * 60 : part * 60 + 60] if first(row)]
            (directory / f"{part}.jsonl").write_text(
                "".join(json.dumps({"text": row}) + "\n" for row in some)
            )
        if lines_are_documents:
            (directory / "3.txt").write_text("".join(f"{t}\n" for t in texts if first(t)))
        else:
            for number, text in enumerate([rows[0], *texts]):
                (directory / f"{3 + number}.txt").write_text(text if first(text) else " ")
        paths = (str(directory / "*.jsonl"), str(directory / "*.txt"))
        found.append(
            TextData(kind="text", paths=paths, eval_fraction=0.2, line_by_line=lines_are_documents)
        )
    return found


def packed(
    data: TextData, tokenizer: Tokenizer, packing_settings: Packing, target: Path
) -> dict[str, Any]:
    target.mkdir()
    counts = packing.pack(
        read_corpus(data, target, Reading()), 2, tokenizer, packing_settings, target
    )
    return {**files_of(target), "counts": counts}


def files_of(directory: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["documents", "words", "lines"])
def test_stores_are_those_of_a_corpus_without_its_duplicates(
    tmp_path: Path,
    bpe: Tokenizer,
    sentences: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Made by one process, which holds a long document in pieces, and in shards by several."""
    with_them, without = corpora(tmp_path, sentences, lines_are_documents=kind == "lines")
    plain = Packing(
        400, **FRAMED, words=kind == "words", by_line=kind == "lines", documents=kind != "lines"
    )
    unique = dataclasses.replace(plain, unique=True)
    expected = packed(without, bpe, plain, tmp_path / "expected")
    found = packed(with_them, bpe, unique, tmp_path / "found")
    everything = packed(with_them, bpe, plain, tmp_path / "all")["counts"]
    assert everything["encoder"]
    counts = found.pop("counts")
    wanted = expected.pop("counts")
    records = np.frombuffer(found.pop(FILE), RECORD)
    assert found == expected
    assert len(records) == wanted["documents"] + wanted["heldout_documents"]
    left_out = everything["documents"] + everything["heldout_documents"]
    left_out -= wanted["documents"] + wanted["heldout_documents"]
    assert left_out > 30
    assert wanted["heldout_documents"] > 5
    tokens = everything["tokens"] + everything["heldout_tokens"]
    tokens -= wanted["tokens"] + wanted["heldout_tokens"]
    assert counts == {**wanted, "duplicates": left_out, "duplicate_tokens": tokens}

    # Each shard is flushed to the disk: a thousand would take half a minute.
    monkeypatch.setattr(of_corpus, "LEAST_BYTES", 50_000)
    divided = shards_of(with_them, tmp_path)
    assert 10 < len(divided) < 50
    work = Work(with_them, tmp_path, bpe, unique, tmp_path / "name.shards", "host-1")
    (tmp_path / "joined").mkdir()
    core = min(os.sched_getaffinity(0))
    in_shards = shard_workers.pack(divided, work, 2, tmp_path / "joined", {core})
    in_shards_files = files_of(tmp_path / "joined")
    assert in_shards_files.pop(FILE) == records.tobytes()
    assert in_shards_files == expected
    assert {name: in_shards[name] for name in counts} == counts


def test_a_run_says_how_many_duplicates_it_left_out(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    """And trains on nothing that is held out, nor on the tokens of a run that keeps them."""
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    (corpus / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:5], "new " * 99])
    )
    both = {"paths": [str(corpus / "*.txt"), str(corpus / "*.jsonl")]}
    kept = prepare(make_config(data=both), run_dir)
    assert kept.duplicates is None
    assert "duplicates" not in json.loads((run_dir / "data.json").read_text())
    other = run_dir.with_name("other")
    other.mkdir()
    config = make_config(data={**both, "deduplicate": True})
    (other / "config.yaml").write_text(to_yaml(config))
    prepared = prepare(config, other)
    assert prepared.duplicates == 45
    assert prepared.training.documents + prepared.held_out.documents == 41
    assert "45 duplicates left out (52.33% of the documents)" in list(
        summary(prepared, by_line=False)
    )
    note = json.loads((other / "data.json").read_text())
    assert note["duplicates"] == 45
    assert note["tokens"] != json.loads((run_dir / "data.json").read_text())["tokens"]
    assert prepare(config, other).duplicates == 45
    assert main(["data", "verify", str(other)]) == 0
    capsys.readouterr()
    assert show.main([str(other)]) == 0
    assert "  45 documents left out as duplicates\n" in capsys.readouterr().out


def test_a_run_trains_on_nothing_of_its_named_held_out_sets(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:3], texts[0]]))
    data = {"deduplicate": True, "eval_paths": {"mine": str(mine)}}
    prepared = prepare(make_config(data=data), run_dir)
    assert prepared.duplicates == 3
    assert prepared.training.documents + prepared.held_out.documents == 37
    (named,) = prepared.named_sets
    assert named.samples.store.document_ends is not None
    assert len(named.samples.store.document_ends) == 3
    stored = [
        mixture.sources[0].store.tokens[:].tobytes()
        for mixture in (prepared.train, prepared.heldout)
    ]
    first = named.samples.store.tokens[: named.samples.store.document_ends[0]].tobytes()
    assert not any(first in tokens for tokens in stored)
    assert prepare(make_config(data=data), run_dir).duplicates == 3


def test_tokens_of_others_have_no_texts_to_compare() -> None:
    with pytest.raises(ValueError, match="deduplicate=true compares texts, and data=tokens has"):
        TokensData(kind="tokens", paths=("a.npy",), deduplicate=True)


def test_what_comes_before_a_corpus_is_not_in_it(
    tmp_path: Path, bpe: Tokenizer, sentences: Callable[..., str]
) -> None:
    """As texts that are held out by name, which training must not have wherever they are."""
    unique = Packing(400, **FRAMED, words=False, by_line=False, documents=True, unique=True)
    texts = [sentences(3, seed=n) for n in range(30)]

    def of(name: str, some: Iterable[str], *before: Path) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        counts = packing.pack(pieces(some), 1, bpe, unique, tmp_path / name, before=before)
        return {**files_of(tmp_path / name), "counts": counts}

    of("set", [*texts[5:9], "of its own"])
    found = of("all", [*texts, texts[0], texts[7]], tmp_path / "set")
    assert found.pop("counts")["duplicates"] == 6
    expected = of("rest", [*texts[:5], *texts[9:]])
    assert expected.pop("counts")["duplicates"] == 0
    assert found == expected
