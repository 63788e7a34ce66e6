"""Preparing a run's data: once, whole, cached, and refused where there is too little of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from train.config import RunConfig, to_yaml
from train.data import prepare
from train.data.cache import build_once, find
from train.data.prepare import noted_samples_per_epoch
from train.errors import UserError

MakeConfig = Callable[..., RunConfig]


def start(config: RunConfig, run_dir: Path) -> subprocess.Popen[str]:
    """Start ``python -m train.data RUN_DIR``."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "train.data", str(run_dir)], stderr=subprocess.PIPE, text=True
    )


def entries(cache: Path, kind: str) -> list[str]:
    return sorted(p.name for p in (cache / kind).iterdir() if p.suffix != ".lock")


def test_a_run_gets_its_tokenizer_and_samples(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    config = make_config()
    prepared = prepare(config, run_dir)
    assert prepared.documents + prepared.heldout_documents == 40
    assert prepared.heldout_documents > 0
    assert prepared.samples_per_epoch == (prepared.tokens - 1) // 32
    assert noted_samples_per_epoch(run_dir) == prepared.samples_per_epoch
    assert prepared.eval_samples == (prepared.heldout_tokens - 1) // 32
    assert (run_dir / "tokenizer" / "tokenizer.json").exists()
    first = str(prepared.tokenizer.decode(prepared.train.get(0, 0).tokens))
    assert any(path.read_text().startswith(first) for path in corpus.iterdir())


def test_the_same_corpus_is_prepared_once(
    corpus: Path, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="train")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        prepare(make_config(data={"sequence_length": 64}), tmp_path / name)
        # Neither length nor seed of the samples is in the tokens.
        prepare(make_config(seed=1), tmp_path / name)
    ends = [message.split(", ")[-1].split(" in ")[0] for message in caplog.messages]
    assert ends == ["prepared", "from cache", "from cache", "from cache"]
    assert len(entries(tmp_path / "cache", "tokens")) == 1


def test_the_log_tells_how_much_there_is(
    corpus: Path, make_config: MakeConfig, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="train")
    prepared = prepare(make_config(), run_dir)
    assert re.fullmatch(
        rf"{prepared.documents} documents, {prepared.tokens:,} tokens, held out "
        rf"{prepared.heldout_documents} documents, {prepared.heldout_tokens:,} tokens, "
        r"prepared in \d+\.\d s",
        caplog.messages[-1],
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"data": {"eval_fraction": 0.2}},
        {"data": {"line_by_line": True}},
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
        counts.append(prepare(make_config(), tmp_path / name).documents)
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
        files = sorted(p for p in (tmp_path / name / "c").rglob("*") if p.is_file())
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
    assert prepare(config, tmp_path / "run").tokens == after.tokens


def test_a_damaged_entry_of_the_cache_is_made_anew(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    tokens = prepare(make_config(), run_dir).tokens
    (path,) = (tmp_path / "cache" / "tokens").glob("*/train-0.uint16")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert prepare(make_config(), run_dir).tokens == tokens
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


def test_a_corpus_too_small_for_one_batch_is_refused(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    config = make_config(trainer={"global_batch_size": 100_000, "micro_batch_size": 1})
    with pytest.raises(
        UserError,
        match=r"data=text is too small for one batch: \d+ training documents with [\d,]+ tokens "
        r"make [\d,]+ samples at data\.sequence_length=32, and trainer\.global_batch_size=100000 "
        r"asks for more; give more text",
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


def test_bad_input_ends_the_command_with_code_2_and_no_traceback(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    (corpus / "99.txt").write_bytes(b"x" * 2**21 + b"\xff")
    child = start(make_config(), run_dir)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 2
    assert stderr.startswith("error: data.paths: ")
    assert f"99.txt is not UTF-8 at byte {2**21} (0xff)" in stderr
    assert "Traceback" not in stderr


def test_preparing_imports_no_torch(corpus: Path, make_config: MakeConfig, run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(to_yaml(make_config()))
    code = (
        "import sys; sys.argv[1:] = [sys.argv[1]]; from train.data.__main__ import main; "
        "assert main() == 0; print('torch' in sys.modules)"
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
