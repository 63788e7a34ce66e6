"""`shardwright inspect`: counts made by hand, and samples that are those of the real batches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from shardwright.train.config import RunConfig, rank_layout, to_yaml
from shardwright.train.data import prepare
from shardwright.train.data.batches.loader import eval_loader, train_loader
from shardwright.train.data.sources.corpus import Piece, read_corpus
from shardwright.train.data.sources.excerpt import Seen, excerpt, rooms
from shardwright.train.data.sources.shards import Span
from shardwright.train.data.sources.source import Reading
from shardwright.train.data.tokens.store import StoreWriter, TokenStore
from shardwright.train.data.upkeep.facts import Wanted
from shardwright.train.data.upkeep.inspection import head, inspected
from shardwright.train.data.upkeep.lengths import Between, longest_of
from shardwright.train.data.upkeep.report import body
from shardwright.train.data.upkeep.texts import Texts, counted
from shardwright.train.errors import UserError

MakeConfig = Callable[..., RunConfig]
Inspect = Callable[..., dict[str, Any]]
ALL_OF_IT = 10**9


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Return a directory with a tokenizer that has a token for each word, and ends documents."""
    vocabulary = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", "a", "bb", "ccc", "dddd", "eeeee"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
    )
    fast.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def inspect(make_config: MakeConfig, run_dir: Path) -> Inspect:
    """Return a function that inspects what a config would train on."""

    def found(
        most_bytes: int = ALL_OF_IT, *, samples: int = 3, held_out: bool = False, **changed: Any
    ) -> dict[str, Any]:
        (run_dir / "config.yaml").write_text(to_yaml(make_config(**changed)))
        return inspected(run_dir, most_bytes, Wanted(samples, held_out))

    return found


def shown(found: dict[str, Any], columns: int = 80) -> str:
    return "\n".join([*head(found), *body(found, columns), *found["lines"]])


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


# --- an excerpt -----------------------------------------------------------------------------------


def test_rooms_lie_evenly_in_each_source() -> None:
    spans = [Span(0, f"a{i}", 10) for i in range(100)] + [Span(1, f"b{i}", 1000) for i in range(64)]
    assert list(rooms(spans, 100_000)) == [
        (span, span.size_bytes * 100_000 // 65_000) for span in spans
    ]
    found = list(rooms(spans, 1000))  # 500 of each source: half of the first, 1 % of the second
    first = [(span.path, room) for span, room in found if span.part == 0]
    second = [(span.path, room) for span, room in found if span.part == 1]
    assert first == [(f"a{i}", 10) for i in range(0, 100, 2)]
    assert second == [(f"b{i}", 500 // 16) for i in range(0, 64, 4)]
    unknown = [Span(0, "http://a", 0), Span(0, "http://b", 0)]
    assert [room for _, room in rooms(unknown, 10)] == [5, 5]


def test_an_excerpt_of_a_small_corpus_is_all_of_it(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    data, seen = make_config().data, Seen()
    pieces = list(excerpt(data, tmp_path, ALL_OF_IT, Reading(), seen))
    assert pieces == list(read_corpus(data, tmp_path))
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert (seen.text_bytes, seen.file_bytes) == (size, size)
    assert (seen.places, seen.of_places, seen.is_whole, seen.documents_cut) == (40, 40, True, 0)
    exactly = Seen()
    assert list(excerpt(data, tmp_path, size, Reading(), exactly)) == pieces
    assert exactly.is_whole


def test_an_excerpt_of_a_larger_one_is_spread_and_says_how_much_it_is(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    data, seen = make_config().data, Seen()
    size = sum(path.stat().st_size for path in corpus.iterdir())
    pieces = list(excerpt(data, tmp_path, size // 4, Reading(), seen))
    # Files are read whole in one piece each, of which some are larger than their share.
    assert (seen.places, seen.of_places, seen.is_whole) == (16, 40, False)
    assert seen.text_bytes == sum(len(piece.text) for piece in pieces)
    texts = {path.read_text(): int(path.stem) for path in corpus.iterdir()}
    assert [texts[piece.text] for piece in pieces] == [i * 40 // 16 for i in range(16)]

    by_number = make_config(data={"max_documents": 30}).data
    seen = Seen()
    pieces = list(excerpt(by_number, tmp_path, 1, Reading(), seen))
    assert [texts[piece.text] for piece in pieces] == [0]
    assert (seen.places, seen.of_places, seen.file_bytes, seen.is_whole) == (0, None, None, False)


def test_a_document_that_is_longer_than_its_share_is_cut(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "long.txt").write_text("a bb " * 200_000)
    data, seen = make_config().data, Seen()
    pieces = list(excerpt(data, tmp_path, 300_000, Reading(), seen))
    assert [piece.ends for piece in pieces] == [False, True]
    assert (seen.documents_cut, seen.is_whole) == (1, False)
    assert 300_000 < seen.text_bytes < 600_000


# --- counts ---------------------------------------------------------------------------------------


def pieces_of(*texts: tuple[int, str]) -> Iterator[Piece]:
    for source, text in texts:
        first, *others = text.split("|")
        yield Piece(first, True, not others, source, False)
        for i, other in enumerate(others):
            yield Piece(other, False, i == len(others) - 1, source, False)


def test_texts_are_counted_by_source_and_known_ones_found() -> None:
    given = ((0, "a bb"), (0, "ccc|c é"), (1, "a bb"), (1, "cccc é"), (1, "d"), (1, "d"))
    found, known = [Texts(), Texts()], set[bytes]()
    assert list(counted(pieces_of(*given), found, known, unique=False)) == list(pieces_of(*given))
    # "ccc" + "c é" is six letters in seven bytes and two words.
    assert found == [Texts(2, 4 + 7, 2 + 2, 0, 0), Texts(4, 4 + 7 + 2, 2 + 2 + 2, 3, 4 + 7 + 1)]
    assert len(known) == 3

    unique = [Texts(), Texts()]
    kept = counted(pieces_of(*given), unique, set(), unique=True)
    assert [piece.text for piece in kept] == ["a bb", "ccc", "c é", "d"]
    assert unique == [Texts(2, 11, 4, 0, 0), Texts(1, 1, 1, 3, 12)]


def test_the_longest_are_found_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, "kept", 100, False, lines=False, documents=True) as writer:
        writer.append(np.arange(14), [], [3, 4, 9, 14])  # of 3, 1, 5 and 5 tokens
    with StoreWriter(tmp_path, "told", 100, False, lines=False) as writer:
        writer.append([5, 2, 6, 7, 8, 9, 2], [], [])  # of 2 and 5, each ended by a 2
    stores = {name: TokenStore(tmp_path, name) for name in ("kept", "told")}
    found = longest_of(stores, Between((2,), ()), 4)
    assert [(key, *one) for key, one in found] == [
        ("kept", 5, 2, 4),
        ("kept", 5, 3, 9),
        ("told", 5, 1, 2),
        ("kept", 3, 0, 0),
    ]
    assert [key for key, _ in longest_of(stores, None, 9)] == ["kept"] * 4


NINE = "a bb ccc dddd eeeee a bb ccc dddd"


def test_counts_are_those_counted_by_hand(inspect: Inspect, tmp_path: Path, words: Path) -> None:
    """Each word is a token, and an end comes to each document."""
    long = jsonl(tmp_path / "long.jsonl", [NINE, "a bb", "a bb", "eeeee eeeee a"])
    fours = "dddd dddd dddd dddd dddd"
    short = jsonl(tmp_path / "short.jsonl", ["a", "ccc", "a bb", "a a a", "a a a a", fours])
    found = inspect(
        data={
            "paths": [long, short],
            "weights": [1, 0.5],
            "sequence_length": 8,
            "eval_fraction": 0,
        },
        tokenizer={"kind": "pretrained", "name": str(words)},
        trainer={"global_batch_size": 2, "micro_batch_size": 1, "max_steps": 2},
    )
    first, second = found["sources"]
    assert first["texts"] == {
        "documents": 4,
        "bytes": 33 + 4 + 4 + 13,
        "words": 9 + 2 + 2 + 3,
        "tokens": 16 + 4,
        "tokens_per_byte": 20 / 54,
        "tokens_per_word": 20 / 16,
        "duplicates": 1,
        "duplicate_bytes": 4,
    }
    assert second["texts"] == {
        "documents": 6,
        "bytes": 1 + 3 + 4 + 5 + 7 + 24,
        "words": 1 + 1 + 2 + 3 + 4 + 5,
        "tokens": 16 + 6,
        "tokens_per_byte": 22 / 44,
        "tokens_per_word": 22 / 16,
        "duplicates": 1,  # the "a bb" of the other source
        "duplicate_bytes": 4,
    }
    # 20 tokens make 2 samples of 8 and a label, 22 as many, of which an epoch sees half.
    assert [source["training"]["samples"] for source in found["sources"]] == [2, 2]
    assert [source["share_of_epoch"] for source in found["sources"]] == [2 / 3, 1 / 3]
    assert found["training"]["tokens"] == 42
    # Samples hold tokens 0 to 8 and 8 to 16. The first source's documents end at 10, 13, 16 and 20:
    # the first is longer than 9, the others are not cut. The second's end at 2, 4, 7, 11, 16, 22:
    # 7 to 11 is in no sample whole.
    assert found["cut"] == {"documents": 10, "longer": 1, "cut": 1, "padding": 0}
    assert (found["longest"][0]["tokens"], found["longest"][0]["number"]) == (10, 0)
    assert found["longest"][0]["begins_with"] == NINE
    assert found["positions"]["padding"] == 0
    assert found["positions"]["positions"] == found["positions"]["predicted"] == 64 * 8
    text = shown(found)
    assert "  2 duplicates among 10 documents that were read, 8 B\n" in text
    assert "  1 of 10 (10.0%) documents are longer than a sample, and cut in any case\n" in text
    assert "  1 of 9 (11.1%) others are cut by a sample's edge\n" in text
    assert re.search(r"long.jsonl +4 +20 +0.370 +1.250 +66.7%\n", text)
    assert re.search(r"short.jsonl +6 +22 +0.500 +1.375 +33.3%\n", text)
    assert max(map(len, text.splitlines()[2:])) <= 80
    wide = shown(found, 160)
    assert re.search(r"long.jsonl +4 +20 +0 +0.370 +1.250 +54 B +1 +66.7%\n", wide)
    assert max(map(len, wide.splitlines()[2:])) <= 160


def test_duplicates_are_left_out_where_that_is_asked_for(
    inspect: Inspect, tmp_path: Path, words: Path
) -> None:
    five = "dddd dddd dddd dddd dddd"
    texts = ["a bb ccc", "a bb ccc", "bb bb", "dddd", "eeeee", "a a", five]
    path = jsonl(tmp_path / "a.jsonl", texts)
    exam = jsonl(tmp_path / "exam.jsonl", ["eeeee", "a bb ccc dddd eeeee a a a a a"])
    found = inspect(
        data={
            "paths": [path],
            "sequence_length": 8,
            "eval_fraction": 0,
            "deduplicate": True,
            "eval_paths": {"exam": exam},
        },
        tokenizer={"kind": "pretrained", "name": str(words)},
        trainer={"global_batch_size": 2, "micro_batch_size": 1, "max_steps": 2},
    )
    counts = found["sources"][0]["texts"]
    # Left are "a bb ccc", "bb bb", "dddd", "a a" and the last.
    assert (counts["documents"], counts["duplicates"]) == (5, 2)
    assert (counts["words"], counts["tokens"]) == (13, 18)
    assert found["duplicates"] == 2
    assert [(s["name"], s["documents"], s["tokens"]) for s in found["held_out_sets"]] == [
        ("exam", 2, 13)
    ]
    assert "held out, exam: 2 documents, 13 tokens, 1 sample" in shown(found)


def test_padding_is_that_of_the_micro_batches(
    inspect: Inspect, tmp_path: Path, words: Path
) -> None:
    """Lines of one, two and three words, in an order of their own, two to a micro-batch."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a\nbb bb\nccc ccc ccc\n" * 4)
    given: dict[str, Any] = {
        "data": {"line_by_line": True, "eval_fraction": 0, "sequence_length": 8},
        "tokenizer": {"kind": "pretrained", "name": str(words)},
        "trainer": {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 2},
    }
    found = inspect(samples=12, **given)
    lengths = [sample["tokens"] for sample in found["samples"]]
    assert sorted(lengths) == [1] * 4 + [2] * 4 + [3] * 4
    padding = [abs(a - b) for a, b in zip(lengths[::2], lengths[1::2], strict=True)]
    assert sum(sample["padding"] for sample in found["samples"]) == sum(padding) > 0
    positions = found["positions"]
    assert positions["micro_batches"] == 64
    assert positions["positions"] - positions["padding"] == positions["predicted"]
    # Each of the 10 whole epochs in it has 24 tokens.
    assert 10 * 24 <= positions["predicted"] <= 11 * 24
    assert "of 12 (0.0%) lines are cut" in shown(found)
    unpadded = inspect(samples=12, **{**given, "data": {**given["data"], "unpad": True}})
    assert unpadded["positions"] == {
        **positions,
        "positions": positions["predicted"],
        "padding": 0,
    }


# --- as the model will see them -------------------------------------------------------------------

MASKED: dict[str, Any] = {"kind": "mlm", "whole_word": True, "masking_rate": 0.4}


@pytest.mark.parametrize(
    ("objective", "data"),
    [
        (MASKED, {"document_attention": True}),
        (MASKED, {"line_by_line": True, "max_cut_fraction": 1}),
        (MASKED, {"packing": "best_fit"}),
        ({"kind": "clm"}, {"stages": [{"tokens": 2048, "sequence_length": 64}, {}]}),
    ],
    ids=["whole_word", "lines", "best_fit", "stages"],
)
def test_samples_are_the_first_batches_of_the_ranks(
    inspect: Inspect,
    make_config: MakeConfig,
    run_dir: Path,
    corpus: Path,
    wordpiece: Path,
    objective: dict[str, Any],
    data: dict[str, Any],
) -> None:
    for path in corpus.iterdir() if data.get("line_by_line") else ():
        path.write_text(path.read_text().replace(". ", "\n"))
    changed: dict[str, Any] = {
        "mlm": objective["kind"] == "mlm",
        "objective": objective,
        "data": data,
        "tokenizer": {"kind": "pretrained", "name": str(wordpiece)},
    }
    if not changed["mlm"]:
        del changed["tokenizer"]
    samples = inspect(samples=48, **changed)["samples"]
    config = make_config(**changed)
    layout = rank_layout(config.strategy, 2)
    prepared = prepare(config, run_dir)
    loaders = [
        iter(train_loader(prepared, config, rank=rank, layout=layout, total_steps=9))
        for rank in (0, 1)
    ]
    expected: list[tuple[Any, Any]] = []
    while len(expected) < 48:
        for batch in map(next, loaders):
            expected += zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    assert [(s["input_ids"], s["labels"]) for s in samples] == expected[:48]


def test_held_out_samples_are_those_of_the_first_evaluation(
    inspect: Inspect, make_config: MakeConfig, run_dir: Path, corpus: Path, wordpiece: Path
) -> None:
    changed: dict[str, Any] = {
        "mlm": True,
        "objective": MASKED,
        "data": {"document_attention": True},
        "tokenizer": {"kind": "pretrained", "name": str(wordpiece)},
    }
    found = inspect(samples=6, held_out=True, **changed)
    config = make_config(**changed)
    prepared = prepare(config, run_dir)
    batches = eval_loader(prepared, config, rank=0, layout=rank_layout(config.strategy, 1))
    expected = [
        row
        for batch in islice(batches, 2)
        for row in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]
    assert [(s["input_ids"], s["labels"]) for s in found["samples"]] == expected[:6]
    assert "of held out" in shown(found).replace("\n  ", " ")


# --- what is in the cache, and what is not --------------------------------------------------------


def test_a_small_corpus_is_prepared_and_a_cached_one_is_not_again(
    inspect: Inspect, corpus: Path, tmp_path: Path
) -> None:
    found = inspect()
    assert not found["was_prepared"]
    assert Path(found["entry"]).parent == tmp_path / "cache" / "tokens"
    assert shown(found).startswith("all of the corpus, prepared for this:\n")
    (tmp_path / "run" / "data.json").unlink()
    again = inspect()
    assert again["was_prepared"]
    assert shown(again).startswith("all of the corpus, in the cache before:\n")
    same = ("was_prepared", "used_at")
    assert {k: v for k, v in found.items() if k not in same} == {
        k: v for k, v in again.items() if k not in same
    }


def test_of_a_large_corpus_an_excerpt_is_shown_and_said(
    inspect: Inspect, corpus: Path, tmp_path: Path
) -> None:
    size = sum(path.stat().st_size for path in corpus.iterdir())
    found = inspect(size // 4)
    assert found["entry"] is None
    assert not (tmp_path / "cache" / "tokens").exists()
    documents = found["training"]["documents"] + found["held_out"]["documents"]
    assert documents == found["sources"][0]["texts"]["documents"] == 16
    tokens = found["training"]["tokens"] + found["held_out"]["tokens"]
    assert found["sources"][0]["texts"]["tokens"] == tokens
    assert len(found["samples"]) == 3
    text = shown(found)
    assert text.startswith("NOT all of the corpus: all that follows is of an excerpt\n")
    assert "from the beginnings of 16 of its 40 places" in text


def test_of_a_large_corpus_in_the_cache_all_is_counted_but_its_texts(
    inspect: Inspect, make_config: MakeConfig, run_dir: Path, corpus: Path
) -> None:
    whole = inspect()
    size = sum(path.stat().st_size for path in corpus.iterdir())
    (run_dir / "data.json").unlink()
    found = inspect(size // 4)
    for name in ("training", "held_out", "cut", "lengths", "longest", "samples", "entry"):
        assert found[name] == whole[name], name
    texts, of_all = (each["sources"][0]["texts"] for each in (found, whole))
    assert (texts["documents"], of_all["documents"]) == (16, 40)
    assert texts["tokens"] < of_all["tokens"]
    assert texts["tokens_per_byte"] == pytest.approx(of_all["tokens_per_byte"], rel=0.05)
    text = shown(found)
    assert text.startswith("all of the corpus, in the cache before:\n")
    assert "tokens per byte and word and duplicates are of that, all else is of the whole" in text


def test_an_excerpt_may_be_too_little_for_a_sample(
    inspect: Inspect, tmp_path: Path, words: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["a bb ccc"] * 40)
    found = inspect(
        1,
        data={"paths": [path], "sequence_length": 16, "eval_fraction": 0},
        tokenizer={"kind": "pretrained", "name": str(words)},
        trainer={"global_batch_size": 2, "micro_batch_size": 1, "max_steps": 2},
    )
    assert (found["samples"], found["positions"]) == ([], None)
    assert found["training"]["samples"] == 0
    assert "of an excerpt" in shown(found)


def test_stored_ids_are_copied_where_they_are_few(
    inspect: Inspect, tmp_path: Path, words: Path
) -> None:
    path = tmp_path / "ids.bin"
    np.array([5, 6, 7, 2, 8, 2] * 20, dtype=np.uint16).tofile(path)
    given: dict[str, Any] = {
        "data": {
            "kind": "tokens",
            "paths": [str(path)],
            "dtype": "uint16",
            "sequence_length": 8,
            "eval_fraction": 0,
        },
        "tokenizer": {"kind": "pretrained", "name": str(words)},
        "trainer": {"global_batch_size": 2, "micro_batch_size": 1, "max_steps": 2},
    }
    with pytest.raises(UserError) as error:
        inspect(100, **given)
    assert str(error.value) == (
        "data=tokens has 240 B, which are not in the cache, and of ids no excerpt is taken; "
        "`shardwright prepare` with the same settings puts them there, or raise --bytes=100B"
    )
    found = inspect(240, **given)
    assert found["texts"] is None
    assert found["training"]["documents"] == 40
    assert "token ids that were stored by others" in shown(found)
    assert inspect(100, **given)["was_prepared"]
