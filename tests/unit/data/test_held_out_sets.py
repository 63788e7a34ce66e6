"""Held-out documents told apart: by source, and as sets of the user's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from shardwright.train.config import RunConfig
from shardwright.train.config.data import TextData
from shardwright.train.data import Prepared, check_corpus, prepare
from shardwright.train.data.batches.held_out import HeldOutSet, portions
from shardwright.train.data.sources.corpus import is_held_out, located
from shardwright.train.errors import UserError
from shardwright.train.loop.evaluation import Sums, metrics, total

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def others(tmp_path: Path, sentences: Callable[..., str]) -> Path:
    """Return a folder of documents with letters of several bytes, and one .jsonl of such rows."""
    folder = tmp_path / "others"
    folder.mkdir()
    texts = [sentences(30, seed=100 + i).replace("e", "é") for i in range(20)]
    for i, text in enumerate(texts):
        (folder / f"{i:02}.txt").write_text(text)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[:8])
    (tmp_path / "exam.jsonl").write_text(rows)
    return folder


@pytest.fixture
def mixed(corpus: Path, others: Path, tmp_path: Path, make_config: MakeConfig) -> RunConfig:
    paths = [str(corpus / "*.txt"), str(others)]
    exam = {"exam": str(tmp_path / "exam.jsonl")}
    return make_config(data={"paths": paths, "eval_fraction": 0.2, "eval_paths": exam})


def test_every_source_and_set_is_evaluated_by_its_name(
    mixed: RunConfig, run_dir: Path, others: Path, corpus: Path
) -> None:
    prepared = prepare(mixed, run_dir)
    own = [each for each in prepared.held_out_sets if each.is_own]
    assert [each.name for each in prepared.held_out_sets] == ["corpus", "others", "exam"]
    assert [each.first for each in prepared.held_out_sets] == [0, len(own[0].samples), 0]
    assert sum(len(each.samples) for each in own) == prepared.eval_samples

    # The set is read whole, in its order, whatever a hash of its documents says.
    rows = [json.loads(row)["text"] for row in (others.parent / "exam.jsonl").open()]
    tokens = np.asarray(prepared.named_sets[0].samples.store.tokens)
    assert str(prepared.tokenizer.decode(tokens)) == "".join(f"{row}</s>" for row in rows)
    noted = json.loads((run_dir / "data.json").read_text())["eval_paths"]
    assert noted["exam"]["documents"] == 8

    for each, folder in zip(own, (corpus, others), strict=True):
        texts = [path.read_text() for path in sorted(folder.iterdir())]
        held_out = [text for text in texts if is_held_out(text, 0.2)]
        assert each.text_bytes == sum(len(text.encode()) for text in held_out)
        ids = [prepared.tokenizer.backend_tokenizer.encode(text).ids for text in held_out]
        assert each.tokens == sum(len(of_text) + 1 for of_text in ids), "with what ends each"
    assert prepared.named_sets[0].text_bytes == sum(len(row.encode()) for row in rows)


def test_documents_in_pieces_have_the_bytes_of_all(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, run_dir: Path, sentences: Any
) -> None:
    long = sentences(40_000).replace("a", "ä")  # 2 MB
    (tmp_path / "long.txt").write_text(long)
    config = make_config(data={"eval_paths": {"long": str(tmp_path / "long.txt")}})
    (found,) = prepare(config, run_dir).named_sets
    kept = found.samples.store.directory / "heldout-0.bytes"
    assert np.frombuffer(kept.read_bytes(), np.int64).tolist() == [len(long.encode())]
    assert found.text_bytes == len(long.encode())


def test_lines_have_the_bytes_of_their_text(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    (tmp_path / "lines.txt").write_text("pure reason\n\n é of reason\n")
    sets = {"lines": str(tmp_path / "lines.txt")}
    lines = {"line_by_line": True, "max_cut_fraction": 1, "eval_paths": sets}
    (found,) = prepare(make_config(data=lines), run_dir).named_sets
    assert len(found.samples) == 2
    assert found.text_bytes == len("pure reason é of reason".encode())


def test_tokens_of_an_earlier_version_leave_bits_per_byte_out(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    prepared = prepare(make_config(), run_dir)
    entry = prepared.heldout.sources[0].store.directory
    index = json.loads((entry / "index.json").read_text())
    del index["files"]["heldout-0.bytes"]
    (entry / "index.json").write_text(json.dumps(index))
    (entry / "heldout-0.bytes").unlink()
    (found,) = prepare(make_config(), run_dir).held_out_sets
    assert found.text_bytes is None
    sums = [Sums(30.0, 1.0, 10.0, 2.0, 0.0, 1.0)]
    assert dict(metrics([found], sums, masked=False)).keys() == {"loss", "perplexity"}


def test_a_set_is_read_once(mixed: RunConfig, run_dir: Path, others: Path) -> None:
    def tokens(prepared: Prepared) -> list[int]:
        return list(prepared.named_sets[0].samples.store.tokens)

    before = tokens(prepare(mixed, run_dir))
    exam = others.parent / "exam.jsonl"
    exam.write_text(exam.read_text() * 2)
    assert tokens(prepare(mixed, run_dir)) == before, "the run began with the other"
    fresh = run_dir.with_name("fresh")
    fresh.mkdir()
    assert len(tokens(prepare(mixed, fresh))) == 2 * len(before)


def test_a_resume_may_add_a_set(
    mixed: RunConfig, corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    data = mixed.data.model_copy(update={"eval_paths": {}})
    first = prepare(mixed.model_copy(update={"data": data}), run_dir)
    then = prepare(mixed, run_dir)
    assert [each.name for each in first.held_out_sets] == ["corpus", "others"]
    assert [each.name for each in then.held_out_sets] == ["corpus", "others", "exam"]
    assert first.heldout.sources[0].store.directory == then.heldout.sources[0].store.directory
    assert "exam" in json.loads((run_dir / "data.json").read_text())["eval_paths"]


def test_paths_of_sets_are_kept_absolute(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for data in ({}, {"kind": "stdlib"}):
        config = make_config(data={**data, "eval_paths": {"exam": "exam.jsonl"}})
        assert located(config.data).eval_paths == {"exam": str(tmp_path / "exam.jsonl")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"data\.eval_paths\.exam: .*exam\.txt does not exist"),
        ("", r"data\.eval_paths\.exam: .*exam\.txt is empty; fill it or leave it out"),
    ],
)
def test_what_is_wrong_with_a_set_is_told_by_its_name(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, text: str | None, message: str
) -> None:
    path = tmp_path / "exam.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        check_corpus(make_config(data={"eval_paths": {"exam": str(path)}}).data)


def test_a_set_too_small_for_a_sample_is_an_error(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    (tmp_path / "exam.txt").write_text("reason")
    config = make_config(data={"eval_paths": {"exam": str(tmp_path / "exam.txt")}})
    with pytest.raises(
        UserError,
        match=r"data\.eval_paths\.exam: 1 documents with \d+ tokens are too few for one sample at "
        r"data\.sequence_length=32; give it more text, or leave it out",
    ):
        prepare(config, run_dir)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"eval_paths": {"a b": "x"}}, r"eval_paths has the name 'a b', by which metrics are"),
        (
            {"paths": ["a", "b"], "names": ["a"]},
            "names has 1 values and paths has 2; give one name",
        ),
        (
            {"paths": ["a", "b"], "names": ["n", "n"]},
            "names has n twice; evaluations tell paths ap",
        ),
        (
            {"paths": ["a", "b"], "names": ["n", "/"]},
            "names has the name '/', by which metrics are",
        ),
        (
            {"paths": ["x/a.txt", "b"], "eval_paths": {"a": "c"}},
            "eval_paths has the name a, by which evaluations call one of paths; call the set",
        ),
    ],
)
def test_names_that_cannot_be_are_refused(
    make_config: MakeConfig, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(data=data)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["one"], ()),
        (["data/wiki.jsonl.gz", "data/code/**/*.py.txt"], ("wiki", "code")),
        (["a/train", "b/train/", "s3://b/train/*.parquet"], ("train", "train-2", "train-3")),
        (["*.txt", "über uns.csv", ".hidden"], ("source", "ber-uns", "hidden")),
    ],
)
def test_a_path_is_called_by_its_own_name(paths: list[str], names: tuple[str, ...]) -> None:
    data = TextData.model_validate({"kind": "text", "paths": tuple(paths)})
    assert data.names_of_paths == names


# --- what is measured -----------------------------------------------------------------------------


class Store:
    def __init__(self, tokens: int, text_bytes: int | None) -> None:
        self.tokens, self.text_bytes = range(tokens), text_bytes


class Some:
    def __init__(self, samples: int, tokens: int, text_bytes: int | None) -> None:
        self.samples, self.store = samples, Store(tokens, text_bytes)

    def __len__(self) -> int:
        return self.samples


def a_set(
    name: str | None, own: bool, *, first: int = 0, tokens: int = 100, known: int | None = 200
) -> HeldOutSet:
    some: Any = Some(10, tokens, known)
    return HeldOutSet(name, some, is_own=own, first=first)


A = Sums(30.0, 4.0, 10.0, 2.0, 0.0, 1.0)
B = Sums(10.0, 2.0, 30.0, 3.0, 1.0, 2.0)


def test_losses_are_sums_over_samples_and_the_runs_own_is_of_its_corpus() -> None:
    sets = [a_set("a", True), a_set("b", True, first=10, tokens=300), a_set("exam", False)]
    found = dict(metrics(sets, [A, B, Sums(99.0, 0.0, 9.0, 1.0, 0.0, 1.0)], masked=False))
    assert found["loss"] == 40 / 40
    assert found["perplexity"] == math.exp(1)
    assert found["bits_per_byte"] == pytest.approx(400 / (400 * math.log(2)))
    assert found["loss/a"] == 3
    assert found["loss/b"] == 10 / 30
    assert found["loss/exam"] == 11
    assert found["bits_per_byte/a"] == pytest.approx(3 * 100 / (200 * math.log(2)))
    assert found["bits_per_byte/b"] == pytest.approx(10 / 30 * 300 / (200 * math.log(2)))
    whole = total(sets, [A, B, A])
    assert (whole.not_finite, whole.batches, whole.samples) == (1, 3, 5)


def test_where_the_corpus_holds_out_nothing_the_loss_is_of_the_users_sets() -> None:
    sets = [a_set("exam", False), a_set("quiz", False)]
    assert dict(metrics(sets, [A, B], masked=True)) == {
        "loss": 1.0,
        "perplexity": math.exp(1),
        "masked_accuracy": 6 / 40,
        "loss/exam": 3.0,
        "loss/quiz": 10 / 30,
    }


def test_what_is_not_known_is_left_out() -> None:
    sets = [a_set("a", True), a_set("b", True, known=None)]
    nothing = Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    names = dict(metrics(sets, [A, B], masked=False)).keys()
    assert names == {"loss", "perplexity", "loss/a", "bits_per_byte/a", "loss/b"}
    names = dict(metrics(sets, [A, nothing], masked=False)).keys()
    assert names == {"loss", "perplexity", "loss/a", "bits_per_byte/a"}


def test_a_limit_holds_for_the_corpus_as_one_and_for_each_set() -> None:
    sets = [a_set("a", True), a_set("b", True, first=10), a_set("exam", False)]
    assert [p.samples for p in portions(sets, None)] == [10, 10, 10]
    assert [p.samples for p in portions(sets, 14)] == [10, 4, 10]
    assert [p.samples for p in portions(sets, 7)] == [7, 0, 7]


# --- a split of the hub -----------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path, sentences: Callable[..., str]) -> dict[str, Any]:
    """Return the section of a data set that has a split to evaluate."""
    texts = {
        name: [sentences(30, seed=first + i) for i in range(count)]
        for name, first, count in (("train", 0, 40), ("validation", 500, 12))
    }
    parts = {name: datasets.Dataset.from_dict({"text": text}) for name, text in texts.items()}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    return {"kind": "hub", "name": str(tmp_path / "saved"), "eval_split": "validation"}


def test_a_split_of_the_hub_is_held_out_whole(
    split: dict[str, Any], run_dir: Path, make_config: MakeConfig
) -> None:
    config = make_config(data={**split, "eval_fraction": 0.0})
    assert config.data.is_evaluated
    for _ in range(2):  # once it is made, and once it is there
        prepared = prepare(config, run_dir)
        (of_split,) = [each for each in prepared.held_out_sets if len(each.samples)]
        assert (of_split.name, of_split.is_own) == ("validation", False)
    noted = json.loads((run_dir / "data.json").read_text())
    assert noted["eval_paths"]["validation"]["path"] == "validation"
    assert noted["eval_paths"]["validation"]["documents"] == 12
    assert prepared.training.documents == 40, "nothing of it is trained on"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eval_split": "train"}, "eval_split=train is the split that is trained on; give another"),
        ({"eval_split": "test[:5]"}, "eval_split has the name 'test\\[:5\\]', by which metrics"),
        ({"eval_paths": {"validation": "x"}}, "eval_paths has the name validation, by which eval"),
    ],
)
def test_what_a_split_cannot_be(
    changed: dict[str, Any], message: str, make_config: MakeConfig
) -> None:
    data = {"kind": "hub", "name": "org/set", "eval_split": "validation", **changed}
    with pytest.raises(UserError, match=message):
        make_config(data=data)


def test_a_split_that_is_not_there_is_named(
    split: dict[str, Any], run_dir: Path, make_config: MakeConfig
) -> None:
    config = make_config(data={**split, "eval_split": "dev"})
    with pytest.raises(UserError, match=r"^data.eval_split=dev: .* no such split .it has: train,"):
        prepare(config, run_dir)
