"""Preparing a run's data: once, whole, cached, and refused where there is too little of it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from shardwright.train.config import RunConfig, to_yaml
from shardwright.train.data import __main__ as data_command
from shardwright.train.data import prepare
from shardwright.train.data.prepare import noted_samples_per_epoch, noted_samples_wanted
from shardwright.train.data.sources.corpus import is_held_out
from shardwright.train.data.tokens import cache, packing, uses
from shardwright.train.data.tokens.cache import build_once, find
from shardwright.train.errors import UserError
from shardwright.train.model.vocabulary import vocabulary_size
from shardwright.train.process import cores
from shardwright.train.run_directory.owner import inherited

MakeConfig = Callable[..., RunConfig]


def start(config: RunConfig, run_dir: Path) -> subprocess.Popen[str]:
    """Start the preparation as on one of a run's nodes, whose launcher owns it."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "shardwright.train.data", str(run_dir)],
        env={**os.environ, **inherited(claim=None)},
        stderr=subprocess.PIPE,
        text=True,
    )


def entries(cache: Path, kind: str) -> list[str]:
    return sorted(p.name for p in (cache / kind).iterdir() if p.suffix not in (".lock", ".used"))


def test_a_large_corpus_is_given_every_core_of_the_node(
    corpus: Path, make_config: MakeConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a rank that is bound to its share of them."""
    mine = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {mine, mine + 1, mine + 2})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound_to.append(cores))
    monkeypatch.setattr(cores, "_before_binding", None)
    bound_to: list[set[int]] = []
    cores.bind(2, 3)
    assert bound_to == [{mine + 2}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {mine + 2})

    given = mock.Mock(side_effect=lambda batches, encoder, _: iter(()))
    monkeypatch.setattr(packing, "SIDE_BY_SIDE_FROM_CHARACTERS", 1)
    monkeypatch.setattr(packing, "encoded", given)
    with suppress(UserError):  # of whatever follows, too little is left
        prepare(make_config(), run_dir)
    assert given.call_args.args[2] == [mine, mine + 1, mine + 2]


def test_where_documents_end_is_kept_where_they_are_told_apart_alone(
    corpus: Path, make_config: MakeConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the tokens of other runs have the name that they had before that was kept."""
    named: list[dict[str, Any]] = []
    real = cache.fingerprint

    def fingerprint(what: dict[str, Any]) -> str:
        named.append(what)
        return real(what)

    monkeypatch.setattr(cache, "fingerprint", fingerprint)
    plain = prepare(make_config(), run_dir)
    told = prepare(make_config(data={"document_attention": True}), run_dir.with_name("told"))
    lines = make_config(data={"line_by_line": True, "max_cut_fraction": 1})
    by_line = prepare(lines, run_dir.with_name("lines"))
    stores = [prepared.train.sources[0].store for prepared in (plain, told, by_line)]
    assert [store.document_ends is not None for store in stores] == [False, True, False]
    assert (stores[0].tokens[:] == stores[1].tokens[:]).all()
    packings = [what["packing"] for what in named if "packing" in what]
    assert [packing.get("documents") for packing in packings] == [None, True, None]


def test_a_run_gets_its_tokenizer_and_samples(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    config = make_config()
    prepared = prepare(config, run_dir)
    training, held_out = prepared.training, prepared.held_out
    assert training.documents + held_out.documents == 40
    assert held_out.documents > 0
    assert training.samples == prepared.samples_per_epoch == (training.tokens - 1) // 32
    assert noted_samples_per_epoch(run_dir) == prepared.samples_per_epoch
    assert held_out.samples == prepared.eval_samples == (held_out.tokens - 1) // 32
    assert 0 <= training.tokens_left_out < 32
    assert (run_dir / "tokenizer" / "tokenizer.json").exists()
    first = str(prepared.tokenizer.decode(prepared.train.get(0, 0).tokens))
    assert any(path.read_text().startswith(first) for path in corpus.iterdir())


def test_the_samples_of_a_number_of_tokens_are_counted_once(
    corpus: Path, make_config: MakeConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {"line_by_line": True, "max_cut_fraction": 1}

    def by_tokens(tokens: int) -> RunConfig:
        length = {"max_steps": None, "max_tokens": tokens, "global_batch_size": 8}
        return make_config(data=lines, trainer=length)

    prepared = prepare(by_tokens(3000), run_dir)
    counted = prepared.samples_of_max_tokens
    assert counted is not None
    assert counted > 3000 / 32, "no line is shorter than a sample"
    assert noted_samples_wanted(by_tokens(3000), run_dir) == counted
    assert noted_samples_wanted(by_tokens(6000), run_dir) is None

    # A resume asks for more; its ranks note it, and what starts next counts nothing.
    more = prepare(by_tokens(6000), run_dir).samples_of_max_tokens
    assert more is not None
    assert more > counted
    monkeypatch.setattr(
        "shardwright.train.data.tokens.counting.samples_of_tokens", lambda *_: pytest.fail("again")
    )
    assert prepare(by_tokens(6000), run_dir).samples_of_max_tokens == more
    assert prepare(make_config(data=lines), run_dir).samples_of_max_tokens is None


def test_the_same_corpus_is_prepared_once(
    corpus: Path, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="shardwright.train")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        prepare(make_config(data={"sequence_length": 64}), tmp_path / name)
        # Neither length nor seed of the samples is in the tokens.
        prepare(make_config(seed=1), tmp_path / name)
    ends = [m.split(" in ")[0] for m in caplog.messages if m.startswith("data ")]
    assert ends == ["data prepared", "data from cache", "data from cache", "data from cache"]
    assert len(entries(tmp_path / "cache", "tokens")) == 1


def test_the_log_tells_how_much_there_is(
    corpus: Path, make_config: MakeConfig, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="shardwright.train")
    prepared = prepare(make_config(), run_dir)
    lines = [
        rf"{name}: {part.documents} documents, {part.tokens:,} tokens in {part.samples:,} samples; "
        rf"{part.tokens_left_out} tokens \(0\.\d\d%\) in none"
        for name, part in (("training", prepared.training), ("held out", prepared.held_out))
    ]
    for line, message in zip(
        [*lines, r"data prepared in \d+\.\d s"], caplog.messages[-3:], strict=True
    ):
        assert re.fullmatch(line, message)


def write_lines(folder: Path, *, long: int) -> None:
    """Write 200 lines of 8 words, of which the first ``long`` are ten times as long."""
    folder.mkdir(exist_ok=True)
    words = "pure reason of the understanding in empty space "
    texts = [f"{i} {words * (10 if i < long else 1)}" for i in range(200)]
    (folder / "lines.txt").write_text("\n\n".join(texts))


def lines_config(make_config: MakeConfig, tmp_path: Path, mlm: bool, **data: object) -> RunConfig:
    data = {
        "paths": [str(tmp_path / "corpus" / "*.txt")],
        "line_by_line": True,
        "eval_fraction": 0.2,
        **data,
    }
    return make_config(mlm=mlm, data=data)


@pytest.mark.parametrize("mlm", [False, True])
def test_lines_longer_than_a_sample_are_counted_with_what_they_lose(
    tmp_path: Path,
    make_config: MakeConfig,
    run_dir: Path,
    caplog: pytest.LogCaptureFixture,
    mlm: bool,
) -> None:
    caplog.set_level("INFO", logger="shardwright.train")
    write_lines(tmp_path / "corpus", long=10)
    config = lines_config(make_config, tmp_path, mlm, max_cut_fraction=0.9)
    prepared = prepare(config, run_dir)
    # By another way: the lines, tokenised alone, against what reaches the batches.
    lines = (tmp_path / "corpus" / "lines.txt").read_text().split("\n\n")
    lengths = {
        held_out: [
            len(prepared.tokenizer(line, add_special_tokens=False).input_ids) + 1
            for line in lines
            if is_held_out(line, 0.2) == held_out
        ]
        for held_out in (False, True)
    }
    room = 31 if mlm else 33
    for held_out, part in ((False, prepared.training), (True, prepared.held_out)):
        long = [n for n in lengths[held_out] if n > room]
        assert part.samples == part.documents == len(lengths[held_out])
        assert part.lines_cut == len(long)
        assert part.tokens_left_out == sum(n - room for n in long)
        assert part.tokens == sum(lengths[held_out]) - part.tokens_left_out
    part = prepared.training
    assert 0 < part.lines_cut <= 10
    told = (
        f"{part.lines_cut} of {part.samples} lines cut, {part.tokens_left_out:,} tokens "
        f"({part.share_left_out:.2%}) in none"
    )
    assert any(told in message for message in caplog.messages)
    noted = json.loads((run_dir / "data.json").read_text())
    assert noted["training"] == {**part._asdict(), "samples_per_epoch": part.samples}
    assert noted["heldout"] == prepared.held_out._asdict()
    assert prepare(config, run_dir).training == part


def test_losing_much_to_cut_lines_is_refused(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    write_lines(tmp_path / "corpus", long=10)
    with pytest.raises(
        UserError,
        match=r"data\.line_by_line=true cuts \d+ of \d+ lines at data\.sequence_length=32: "
        r"\d\d\.\d% of the tokens would be in no sample, more than data\.max_cut_fraction=0\.05; "
        r"raise data\.sequence_length \(the longest line has \d+ tokens\).*=false",
    ):
        prepare(lines_config(make_config, tmp_path, True), run_dir)
    assert not (run_dir / "data.json").exists()
    write_lines(tmp_path / "corpus", long=0)
    assert prepare(lines_config(make_config, tmp_path, True), run_dir).training.lines_cut == 0


def test_empty_files_that_a_glob_matched_are_told_once(
    corpus: Path,
    make_config: MakeConfig,
    run_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="shardwright.train")
    for name in ("000.txt", "99.txt"):
        (corpus / name).write_text("")
    prepare(make_config(), run_dir)
    line = f"2 empty files skipped: {corpus / '000.txt'}, {corpus / '99.txt'}"
    assert caplog.messages.count(line) == 1
    noted = json.loads((run_dir / "data.json").read_text())
    assert noted["empty_files"] == 2
    assert noted["skipped"] == {
        "empty files": {"count": 2, "places": [f"{corpus}/000.txt", f"{corpus}/99.txt"]}
    }
    (tmp_path / "other").mkdir()
    assert prepare(make_config(), tmp_path / "other").empty_files == 2, "from the cache, too"


def test_a_run_that_began_with_cut_lines_goes_on(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    write_lines(tmp_path / "corpus", long=10)
    begun = prepare(lines_config(make_config, tmp_path, True, max_cut_fraction=1.0), run_dir)
    # As earlier versions noted it, which knew no bound either.
    note = json.loads((run_dir / "data.json").read_text())
    note["training"] = {"documents": 1, "tokens": 1, "samples_per_epoch": begun.samples_per_epoch}
    note["heldout"] = {"documents": 1, "tokens": 1}
    (run_dir / "data.json").write_text(json.dumps(note))
    again = prepare(lines_config(make_config, tmp_path, True), run_dir)
    assert (again.training, again.held_out) == (begun.training, begun.held_out)


def test_a_vocabulary_that_is_not_filled_is_told_before_the_run(
    corpus: Path, make_config: MakeConfig, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(model={"vocab_size": 5000, "pad_vocab_to_multiple": 64})
    size = vocabulary_size(prepare(config, run_dir).tokenizer)
    assert size < 1000
    assert caplog.messages[:2] == [
        f"tokenizer=byte_bpe has {size} tokens instead of 5,000: the training documents hold no "
        "more pairs that occur tokenizer.min_frequency=2 times",
        f"model.vocab_size=5000 gives the embedding {5000 - size:,} rows that no token uses; "
        f"model.vocab_size={size} is enough for tokenizer=byte_bpe",
    ]
    assert json.loads((run_dir / "data.json").read_text())["tokenizer"] == {"tokens": size}
    caplog.clear()
    shutil.rmtree(run_dir)
    run_dir.mkdir()
    prepare(make_config(), run_dir)
    assert not [m for m in caplog.messages if "vocab" in m or "tokens instead" in m]


@pytest.mark.parametrize(
    "changed",
    [
        {"data": {"eval_fraction": 0.2}},
        {"data": {"line_by_line": True, "max_cut_fraction": 1.0}},
        {"data": {"max_documents": 30}},
        {"tokenizer": {"vocab_size": 300}},
    ],
)
def test_other_tokens_are_prepared_apart(
    corpus: Path, make_config: MakeConfig, tmp_path: Path, changed: dict[str, dict[str, object]]
) -> None:
    for name, config in (("first", make_config()), ("second", make_config(**changed))):
        (tmp_path / name).mkdir()
        prepare(config, tmp_path / name)
    assert len(entries(tmp_path / "cache", "tokens")) == 2


def test_a_changed_corpus_is_prepared_again_for_a_new_run(
    corpus: Path, make_config: MakeConfig, tmp_path: Path, sentences: Callable[..., str]
) -> None:
    counts = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        counts.append(prepare(make_config(), tmp_path / name).training.documents)
        for i in range(40, 60):
            (corpus / f"{i}.txt").write_text(sentences(60, seed=i))
    assert counts[1] > counts[0]


def test_a_begun_run_keeps_its_tokens_without_the_corpus(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    before = prepare(make_config(), run_dir)
    shutil.rmtree(corpus)
    after = prepare(make_config(), run_dir)
    assert (before.train.get(0, 5).tokens == after.train.get(0, 5).tokens).all()


def test_a_begun_run_refuses_another_corpus(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    prepare(make_config(), run_dir)
    shutil.rmtree(tmp_path / "cache")
    prepare(make_config(), run_dir)
    shutil.rmtree(tmp_path / "cache")
    (corpus / "00.txt").write_text("changed")
    with pytest.raises(
        UserError, match=r"run: data=text has changed since this run began.*restore"
    ):
        prepare(make_config(), run_dir)


def test_preparing_is_deterministic(corpus: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        config = make_config(
            mlm=True, objective={"whole_word": True}, data={"cache_dir": str(tmp_path / name / "c")}
        )
        prepare(config, tmp_path / name)
        files = sorted(
            p
            for p in (tmp_path / name / "c").rglob("*")
            if p.is_file() and p.suffix != uses.SUFFIX  # names the run
        )
        contents.append({p.relative_to(tmp_path / name): p.read_bytes() for p in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) > 6


def test_processes_that_start_together_prepare_once(
    corpus: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    # Two share a run directory, as ranks do; the third is another run.
    children = [start(make_config(), tmp_path / name) for name in ("run", "run", "other")]
    logs = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], logs
    assert sum("prepared in" in log for log in logs) == 1, logs
    assert sum("from cache in" in log for log in logs) == 2, logs
    assert len(entries(tmp_path / "cache", "tokenizers")) == 1
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "data.json",
        "tokenizer",
    ]


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, make_config: MakeConfig, sentences: Callable[..., str]
) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(50):
        (tmp_path / "corpus" / f"{i:02}.txt").write_text(sentences(1200, seed=i))
    config = make_config(tokenizer={"max_training_bytes": 20_000})
    child = start(config, tmp_path / "run")
    tokens = tmp_path / "cache" / "tokens"
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in tokens.glob("*.tmp-*/train-0.uint16")):
        assert time.monotonic() < deadline
        assert child.poll() is None, "finished before it could be killed"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (left,) = entries(tmp_path / "cache", "tokens")
    assert ".tmp-" in left

    after = prepare(config, tmp_path / "run")
    (entry,) = entries(tmp_path / "cache", "tokens")
    assert ".tmp-" not in entry
    shutil.rmtree(tmp_path / "cache")
    assert prepare(config, tmp_path / "run").training == after.training


def test_a_damaged_entry_of_the_cache_is_made_anew(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    training = prepare(make_config(), run_dir).training
    (path,) = (tmp_path / "cache" / "tokens").glob("*/train-0.uint16")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert prepare(make_config(), run_dir).training == training
    assert path.read_bytes() == whole


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(directory: Path) -> dict[str, object]:
        (directory / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build_once(tmp_path / "c", "name", build)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["name.lock"]
    assert find(tmp_path / "c", "name") is None


def test_a_cache_that_cannot_be_written_is_refused(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(data={"cache_dir": str(tmp_path / "file" / "cache")})
    with pytest.raises(
        UserError,
        match=r"data\.cache_dir: cannot write .* \(Not a directory\); set data\.cache_dir",
    ):
        prepare(config, run_dir)


def test_a_cache_whose_directory_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(Path, "mkdir", refuse)  # as below /proc, where root gets it too
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .* set data\.cache_dir to"):
        build_once(tmp_path / "c", "name", lambda directory: {})


def test_a_corpus_too_small_for_one_batch_is_refused(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    config = make_config(trainer={"global_batch_size": 100_000, "micro_batch_size": 1})
    with pytest.raises(
        UserError,
        match=r"data=text is too small for one batch: \d+ training documents with [\d,]+ tokens "
        r"make [\d,]+ samples at data\.sequence_length=32, and trainer\.global_batch_size=100000 "
        r"needs more; give more text",
    ):
        prepare(config, run_dir)


def test_a_held_out_set_without_a_sample_is_refused(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    config = make_config(data={"eval_fraction": 1e-9})
    with pytest.raises(
        UserError,
        match=r"data\.eval_fraction=1e-09 holds out 0 documents with 0 tokens, too few for one "
        r".*raise data\.eval_fraction.*or set it to 0",
    ):
        prepare(config, run_dir)
    shutil.rmtree(run_dir / "tokenizer")
    assert prepare(make_config(data={"eval_fraction": 0.0}), run_dir).eval_samples == 0


def test_weights_make_the_epoch(corpus: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    paths = [f"{corpus}/[012]*.txt", f"{corpus}/3*.txt"]
    sizes = {}
    for weights in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.5)):
        run_dir = tmp_path / str(weights)
        run_dir.mkdir()
        prepared = prepare(make_config(data={"paths": paths, "weights": weights}), run_dir)
        sizes[weights] = prepared.samples_per_epoch
        a, b = (len(samples) for samples in prepared.train.sources)
    assert sizes == {(1.0, 1.0): a + b, (2.0, 1.0): 2 * a + b, (1.0, 0.5): a + round(b / 2)}


def test_a_source_without_a_sample_is_refused(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("pure reason")
    paths = [f"{corpus}/*.txt", str(tmp_path / "short.txt")]
    with pytest.raises(
        UserError,
        match=r"data\.paths: .*short\.txt would give no sample: \d training tokens are too few for "
        r"one at data\.sequence_length=32; give it more text",
    ):
        prepare(make_config(data={"paths": paths, "eval_fraction": 0.0}), run_dir)
    assert not (run_dir / "data.json").exists()


def test_a_source_that_is_never_reached_is_refused(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    paths = [f"{corpus}/[012]*.txt", f"{corpus}/3*.txt"]
    with pytest.raises(
        UserError,
        match=r"data\.paths: .*/3\*\.txt would give nothing: data\.max_documents=30 are read from "
        r"the paths before it; raise data\.max_documents, or leave the path out",
    ):
        prepare(make_config(data={"paths": paths, "max_documents": 30}), run_dir)
    config = make_config(data={"paths": paths, "max_documents": 35})
    assert len(prepare(config, run_dir).train.sources[1]) > 0


def test_a_source_of_which_nothing_is_held_out_is_told(
    corpus: Path, make_config: MakeConfig, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = next(p for p in sorted(corpus.iterdir()) if not is_held_out(p.read_text(), 0.1))
    other = corpus / "more"
    other.mkdir()
    kept.rename(other / kept.name)
    paths = [f"{corpus}/*.txt", str(other / kept.name)]
    prepare(make_config(data={"paths": paths}), run_dir)
    told = f"no sample of data.paths: {other / kept.name} is held out for evaluation"
    assert [m for m in caplog.messages if "held out for" in m] == [told]


def test_bad_input_ends_the_command_with_code_2_and_no_traceback(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    (corpus / "99.txt").write_bytes(b"x" * 2**21 + b"\xff")
    child = start(make_config(data={"on_bad_document": "error"}), run_dir)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 2
    assert stderr.splitlines()[-1].startswith("error: data.paths: ")
    assert f"99.txt is not UTF-8 at byte {2**21} (0xff)" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", '{"text": "\\ud83d"}\n' + "[" * 100_000, "line 2 is nested too deeply"),
        ("a.jsonl", '{"text": "x"}\n{"n": ' + "9" * 5000 + "}", "line 2 is not JSON"),
        ("a.csv", 'text\none\n"two\n', "line 3 opens a quote that is never closed"),
    ],
    ids=["deep", "long number", "open quote"],
)
def test_what_cannot_be_read_ends_with_code_2_and_leaves_nothing(
    tmp_path: Path, make_config: MakeConfig, name: str, content: str, error: str
) -> None:
    (tmp_path / name).write_text(content)
    child = start(make_config(data={"paths": [str(tmp_path / name)]}), tmp_path / "run")
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == 2
    assert stderr.splitlines()[-1].startswith("error: data.paths: ")
    assert error in stderr
    assert "Traceback" not in stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_preparing_imports_no_torch(corpus: Path, make_config: MakeConfig, run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(to_yaml(make_config()))
    code = (
        "import os, sys; from pathlib import Path; from shardwright.train import config; "
        "from shardwright.train.data import __main__; run_dir = Path(sys.argv[1]); "
        "assert __main__._work(run_dir, config.load(run_dir), os.getppid()) == 0; "
        "print('torch' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(run_dir)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("No space left on device (os error 28)"), "set data.cache_dir to a directory"),
        (MemoryError(), "host memory has run out\nless is needed with a smaller tokenizer.max_tr"),
    ],
)
def test_what_ran_out_is_said_without_a_traceback(
    error: Exception,
    said: str,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(data_command, "prepare", fail)
    assert data_command._prepared(tmp_path, make_config()) == 1
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
