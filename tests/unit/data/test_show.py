"""`shardwright data show`: what a run trains on, as it is stored and as the model sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from shardwright.train.config import RunConfig, to_yaml
from shardwright.train.data import prepare
from shardwright.train.data.batches.collator import IGNORED
from shardwright.train.data.batches.sampler import sample_at
from shardwright.train.data.prepare import Prepared
from shardwright.train.data.sources.corpus import is_held_out
from shardwright.train.data.tokens import uses
from shardwright.train.data.tokens.cache import INDEX
from shardwright.train.data.upkeep import show
from shardwright.train.data.upkeep.lengths import Between, Lengths, ends_in, histogram
from shardwright.train.data.upkeep.shown_samples import Decoder, visible

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def prepared_run(make_config: MakeConfig, run_dir: Path, corpus: Path) -> Callable[..., Prepared]:
    """Return a function that prepares a run whose config is kept."""

    def make(**changed: Any) -> Prepared:
        config = make_config(**changed)
        (run_dir / "config.yaml").write_text(to_yaml(config))
        return prepare(config, run_dir)

    return make


@pytest.fixture
def spaced(wordpiece: Path) -> Path:
    """Return a directory with a BERT tokenizer that puts spaces between words again."""
    file = wordpiece / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.save(str(file))
    return wordpiece


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert show.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(shown(capsys, *arguments, "--json"))
    return tree


def entry_of(run_dir: Path, tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tokens" / json.loads((run_dir / "data.json").read_text())["tokens"]


def test_counts_are_those_of_the_run(
    prepared_run: Callable[..., Prepared],
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared = prepared_run()
    tree = as_json(capsys, run_dir)
    training, held_out = tree["training"], tree["held_out"]
    assert training["documents"] == prepared.training.documents
    assert training["samples"] == prepared.training.samples
    assert training["tokens"] == len(prepared.train.sources[0].store.tokens)
    assert held_out["documents"] + training["documents"] == 40
    texts = [path.read_text() for path in (tmp_path / "corpus").iterdir()]
    held_out_bytes = sum(len(text) for text in texts if is_held_out(text, 0.1))
    assert held_out["bytes"] == held_out_bytes
    assert held_out["tokens_per_byte"] == held_out["tokens"] / held_out_bytes
    assert "tokens_per_byte" not in training  # where that is not kept
    assert tree["entry"] == str(entry_of(run_dir, tmp_path))
    assert [source["training"]["documents"] for source in tree["sources"]] == [
        training["documents"]
    ]
    text = shown(capsys, run_dir)
    assert re.search(rf"documents +{training['documents']} +{held_out['documents']}\n", text)
    assert max(map(len, text.splitlines()[2:])) <= 80


def test_lengths_are_known_where_only_the_ids_tell_them(
    prepared_run: Callable[..., Prepared], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what stands between documents, which no text can spell."""
    prepared_run()
    by_ids = as_json(capsys, run_dir)["lengths"]
    (run_dir / "data.json").unlink()
    prepared = prepared_run(data={"document_attention": True})
    kept = as_json(capsys, run_dir)["lengths"]
    assert by_ids == kept
    lengths = np.concatenate(
        [
            np.diff(mixture.sources[0].store.document_ends, prepend=0)
            for mixture in (prepared.train, prepared.heldout)
        ]
    )
    assert (kept["count"], kept["shortest"], kept["longest"]) == (
        40,
        lengths.min(),
        lengths.max(),
    )
    assert kept["mean"] == pytest.approx(lengths.mean())
    assert sum(count for _, _, count in kept["counts"]) == 40
    assert all(
        count == ((lengths >= low) & (lengths <= high)).sum() for low, high, count in kept["counts"]
    )


def test_ends_between_documents() -> None:
    """Also where the same id ends one and begins the next, and where a frame has several."""
    tokens = np.array([2, 5, 2, 2, 6, 7, 2, 2, 8, 2])
    assert ends_in(tokens, Between((2,), (2,))).tolist() == [3, 7]
    assert ends_in(tokens, Between((2,), ())).tolist() == [1, 3, 4, 7, 8, 10]
    assert ends_in(np.array([5, 3, 4, 6, 3, 4]), Between((3, 4), ())).tolist() == [3, 6]
    assert ends_in(np.array([3]), Between((3, 4), ())).tolist() == []


def test_a_histogram_has_a_line_for_each_power_of_two() -> None:
    lengths = Lengths()
    lengths.add(np.array([0, 1, 1, 1, 1, 9]))
    lengths.add(np.array([8]))
    assert (lengths.documents, lengths.tokens, lengths.shortest, lengths.longest) == (6, 21, 1, 9)
    assert [" ".join(line.split()) for line in histogram(lengths)] == [
        "1 4 " + "#" * 40,
        "2 to 3 0",
        "4 to 7 0",
        "8 to 15 2 " + "#" * 20,
    ]


def test_samples_are_those_that_the_model_sees_first(
    prepared_run: Callable[..., Prepared], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepared_run(data={"document_attention": True})
    samples = as_json(capsys, run_dir, "--samples", "40")["samples"]
    assert len(samples) == 40
    several = 0
    for position, sample in enumerate(samples):
        key = sample_at(0, len(prepared.train), position)
        window = prepared.train.get(key.epoch, key.sample)
        assert sample["input_ids"] == window.tokens[:-1].tolist()
        assert sample["labels"] == window.tokens[1:].tolist()
        assert sample["document_ends"] == [e for e in window.document_ends.tolist() if e < 32]
        assert len(sample["documents"]) == len(sample["document_ends"]) + 1
        whole = prepared.tokenizer.decode(window.tokens[:-1])
        assert "".join(sample["documents"]) == whole
        several += len(sample["documents"]) > 1
    assert several
    assert "  ---- another document ----\n" in shown(capsys, run_dir, "--samples", "40")
    assert as_json(capsys, run_dir, "--samples", "0")["samples"] == []


def test_documents_are_set_apart_where_the_model_does_not_know_of_them(
    prepared_run: Callable[..., Prepared], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared_run()
    plain = as_json(capsys, run_dir, "--samples", "40")["samples"]
    (run_dir / "data.json").unlink()
    prepared_run(data={"document_attention": True})
    assert plain == as_json(capsys, run_dir, "--samples", "40")["samples"]


def test_the_first_samples_are_those_of_the_first_stage(
    prepared_run: Callable[..., Prepared], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"tokens": 2048, "sequence_length": 64}, {}]
    prepared = prepared_run(data={"stages": stages})
    (sample,) = as_json(capsys, run_dir, "--samples", "1")["samples"]
    key = sample_at(0, len(prepared.stages[0]), 0)
    window = prepared.stages[0].get(key.epoch, key.sample)
    assert sample["input_ids"] == window.tokens[:-1].tolist()
    assert sample["tokens"] == len(sample["input_ids"]) == 64


@pytest.mark.parametrize("whole_word", [False, True])
def test_masked_positions_say_what_was_there(
    prepared_run: Callable[..., Prepared],
    run_dir: Path,
    spaced: Path,
    capsys: pytest.CaptureFixture[str],
    whole_word: bool,
) -> None:
    prepared = prepared_run(
        mlm=True,
        objective={"kind": "mlm", "whole_word": whole_word, "masking_rate": 0.4},
        tokenizer={"kind": "pretrained", "name": str(spaced)},
        data={"document_attention": True},
    )
    samples = as_json(capsys, run_dir, "--samples", "8")["samples"]
    mask = prepared.tokenizer.mask_token_id
    kinds = set()
    for sample in samples:
        ids, labels = np.array(sample["input_ids"]), np.array(sample["labels"])
        assert sample["masked_positions"] == np.flatnonzero(labels != IGNORED).tolist()
        marks = re.findall(r"«(\S+): (.*?)»", "".join(sample["documents"]))
        assert len(marks) == len(sample["masked_positions"])
        for (kind, was), place in zip(marks, sample["masked_positions"], strict=True):
            token = str(prepared.tokenizer.convert_ids_to_tokens(int(labels[place])))
            assert was in (token, token.removeprefix("##"))
            seen = "mask" if ids[place] == mask else "kept" if ids[place] == labels[place] else ""
            kinds.add(seen)
            assert kind == seen if seen else kind not in ("mask", "kept")
        # With all put back it is the text.
        original = np.where(labels == IGNORED, ids, labels)
        text = "".join(re.sub(r"«\S+: (.*?)»", r"\1", d) for d in sample["documents"])
        bounds = [0, *sample["document_ends"], len(ids)]
        assert text == "".join(
            str(prepared.tokenizer.decode(original[a:b], clean_up_tokenization_spaces=False))
            for a, b in pairwise(bounds)
        )
    assert kinds == {"mask", "kept", ""}
    text = shown(capsys, run_dir)
    assert "«mask: dove» is a masked «dove»" in text
    assert "to be predicted; number" in text.replace("\n  ", " ")


def test_padding_is_that_of_a_micro_batch(
    prepared_run: Callable[..., Prepared],
    run_dir: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in corpus.iterdir():
        path.write_text("".join(f"{'dove ' * (n % 4 + 1)}\n" for n in range(12)))
    lines = {"line_by_line": True, "max_cut_fraction": 1}
    prepared_run(data=lines)
    samples = as_json(capsys, run_dir, "--samples", "6")["samples"]
    assert [len(sample["input_ids"]) for sample in samples[:4]] == [
        max(sample["tokens"] for sample in samples[:4])
    ] * 4
    assert sum(sample["padding"] for sample in samples) > 0
    assert all(sample["tokens"] + sample["padding"] == len(sample["labels"]) for sample in samples)
    text = shown(capsys, run_dir, "--samples", "6")
    assert re.search(r"^  ---- \d+ of padding ----$", text, re.MULTILINE)
    assert "480 lines of 3 to" in text or "480 lines of 2 to" in text
    (run_dir / "data.json").unlink()
    prepared_run(data={**lines, "unpad": True})
    assert not any(s["padding"] for s in as_json(capsys, run_dir, "--samples", "6")["samples"])


def test_an_entry_by_itself_shows_what_its_run_tells_of_it(
    prepared_run: Callable[..., Prepared],
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared_run()
    entry = entry_of(run_dir, tmp_path)
    whole = as_json(capsys, entry)
    assert whole["run"] == str(run_dir)
    assert len(whole["samples"]) == 3
    uses.file_of(entry.parent, entry.name).unlink()
    alone = as_json(capsys, entry)
    assert (alone["run"], alone["samples"], alone["lengths"]) == (None, [], None)
    assert alone["training"]["documents"] == whole["training"]["documents"]
    text = shown(capsys, entry)
    assert "It is not kept where documents end, and no run is known whose tokenizer tells" in text
    assert "No run is known that uses it: give a run directory to see samples." in text


def test_sources_are_counted_apart(
    prepared_run: Callable[..., Prepared],
    run_dir: Path,
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    sentences: Callable[..., str],
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": sentences(9, i)}) + "\n" for i in range(30)))
    prepared_run(data={"paths": [str(corpus), str(other)], "weights": [1, 0.5]})
    sources = as_json(capsys, run_dir)["sources"]
    documents = [s["training"]["documents"] + s["held_out"]["documents"] for s in sources]
    assert documents == [40, 30]
    assert [source["weight"] for source in sources] == [1, 0.5]
    text = shown(capsys, run_dir)
    assert re.search(r"^  source +documents +tokens +held out$", text, re.MULTILINE)
    assert re.search(r"other.jsonl +\d+ ", text)
    assert max(map(len, text.splitlines()[2:])) <= 80


def test_what_a_corpus_holds_does_nothing_to_a_terminal() -> None:
    assert visible("a\x1b[2Jb\tc\nd\u202e\x00é") == "a\\x1b[2Jb\\tc\nd\\u202e\\x00é"


def test_parts_of_a_text_keep_the_spaces_between_them(spaced: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(spaced)
    ids = tokenizer.encode("the understanding can think", add_special_tokens=False)
    decoder = Decoder(tokenizer)
    parts = [decoder.part(ids[i : i + 1], ids[i - 1] if i else None) for i in range(len(ids))]
    assert "".join(parts) == "the understanding can think"


def test_what_cannot_be_shown_is_said(
    make_config: MakeConfig, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([str(tmp_path)]) == 2
    assert re.search(
        rf"error: {re.escape(str(tmp_path))} is neither a run directory, which has a config.yaml, "
        r"nor an entry of the cache, which has an index.json; give the directory that",
        capsys.readouterr().err,
    )
    (run_dir / "config.yaml").write_text(to_yaml(make_config()))
    assert show.main([str(run_dir)]) == 2
    assert "has no data.json yet: its data is not prepared; start" in capsys.readouterr().err
    (run_dir / "data.json").write_text('{"tokens": "gone"}')
    assert show.main([str(run_dir)]) == 2
    assert "tokens/gone is not in the cache (any more)" in capsys.readouterr().err
    entry = tmp_path / "cache" / "tokens" / "gone"
    entry.mkdir(parents=True)
    (entry / INDEX).write_text("{}")
    assert show.main([str(run_dir)]) == 2
    assert "index.json cannot be read" in capsys.readouterr().err
