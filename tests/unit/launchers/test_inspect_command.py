"""`shardwright inspect`: composed as a run is, and shown by a process that has the libraries."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shardwright.train.errors import BAD_INPUT
from tests.e2e.cli import TINY
from tests.unit.launchers.fakes import ROOT, Shardwright, make_shardwright

TEXT = "The light dove, cleaving the air in her free flight, and feeling its resistance. "


@pytest.fixture
def shardwright(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Shardwright:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(tempfile, "tempdir", None)
    return make_shardwright(tmp_path, monkeypatch, capfd)


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"{i} {TEXT}" * 20)
    return [
        *("model=gpt2_tiny", "objective=clm", *TINY, "data=text", f"data.paths=['{folder}']"),
        *("data.sequence_length=32", "data.eval_fraction=0.2", "trainer.global_batch_size=8"),
        f"data.cache_dir='{tmp_path / 'cache'}'",
    ]


def test_it_shows_the_data_and_leaves_what_a_run_finds(
    shardwright: Shardwright, overrides: list[str], tmp_path: Path
) -> None:
    first = shardwright("inspect", "--samples", "1", *overrides)
    assert first.code == 0, first.err
    assert first.out.startswith("all of the corpus, prepared for this:\n")
    assert "\nsample 0: 32 tokens of " in first.out
    assert "\nsample 1" not in first.out
    assert "\x1b" not in first.out
    assert max(map(len, first.out.splitlines()[2:])) <= 80
    again = shardwright("inspect", *overrides, "--json", "--held-out", "--bytes=2kB")
    found = json.loads(again.out)
    assert (found["was_prepared"], found["texts"]["is_whole"]) == (True, False)
    assert found["entry"] in first.out
    assert len(found["samples"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"scratch", "corpus", "cache"}
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bytes", "much"], "argument --bytes: much is not a size such as 32MB or 1GiB"),
        (["--bytes=0"], "argument --bytes: 0 is not a size such as 32MB or 1GiB"),
        (["--samples=-1"], "argument --samples: -1 is less than 0"),
        (["-m", "seed=1,2"], "-m starts several runs, and the data of one are shown; leave -m out"),
        (["data.paths=[nothing.txt]"], "nothing.txt does not exist"),
        (["data.sequence_lenght=8"], "data.sequence_length"),
        (["trainer.global_batch_size=80000"], "data=text is too small for one batch"),
    ],
)
def test_what_is_wrong_is_said(
    shardwright: Shardwright, overrides: list[str], words: list[str], message: str
) -> None:
    if "global_batch_size" not in words[0]:
        overrides = [*overrides, "trainer.global_batch_size=8"]
    outcome = shardwright("inspect", *overrides, *words)
    assert outcome.code == BAD_INPUT
    assert message in outcome.err
    assert outcome.out == ""


def test_a_signal_ends_it_and_its_directory(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "scratch")}
    with subprocess.Popen(
        [sys.executable, "-m", "shardwright", "inspect", *overrides],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stderr is not None
        assert any("inspecting the data" in line for line in started.stderr)
        started.send_signal(signal.SIGTERM)
    assert started.returncode == 128 + signal.SIGTERM
    assert not list((tmp_path / "scratch").iterdir())
