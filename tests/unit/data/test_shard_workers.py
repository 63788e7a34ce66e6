"""Shards made by processes: the same bytes for any number of them, whenever one was killed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from shardwright.train import config
from shardwright.train.config import to_yaml
from shardwright.train.config.data import TextData
from shardwright.train.data import __main__ as data_command
from shardwright.train.data import prepare
from shardwright.train.data.prepare import prepare_part
from shardwright.train.data.sources import shards as of_corpus
from shardwright.train.data.sources.corpus import read_corpus, shards_of
from shardwright.train.data.sources.shards import Shard, Span
from shardwright.train.data.sources.source import Reading
from shardwright.train.data.tokens import cache, packing, shard_workers, shards
from shardwright.train.data.tokens.encoding import Packing
from shardwright.train.data.tokens.shards import Made, Work
from shardwright.train.data.tokens.training import train_byte_bpe
from shardwright.train.errors import FAILED, UserError
from shardwright.train.process import cores

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
PLAIN = Packing(400, prefix=(0,), suffix=(2,), control=(0, 1, 2), words=False, by_line=False)
CORE = min(os.sched_getaffinity(0))


@pytest.fixture
def bpe(sentences: Callable[..., str]) -> Tokenizer:
    return train_byte_bpe([sentences(200)], 400, 2, SPECIAL)


@pytest.fixture
def mixed(
    tmp_path: Path, sentences: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> TextData:
    """Return a corpus of three sources in a dozen shards and more."""
    monkeypatch.setattr(of_corpus, "LEAST_BYTES", 1000)
    monkeypatch.setattr(packing, "SIDE_BY_SIDE_FROM_CHARACTERS", 4000)
    rows = [sentences(i % 5, seed=i) for i in range(60)]
    lines = "\r\n".join(json.dumps({"text": f"{row}\n\nsecond"}) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": rows}), tmp_path / "rows.parquet", row_group_size=10
    )
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("\n\n".join(sentences(9, seed=i).split(".")))
    (tmp_path / "empty.txt").touch()
    paths = [str(tmp_path / name) for name in ("rows.jsonl", "*.txt", "*.parquet")]
    return TextData(kind="text", paths=tuple(paths), weights=(1, 2, 0.5), eval_fraction=0.2)


def work_of(data: TextData, tokenizer: Tokenizer, settings: Packing, folder: Path) -> Work:
    directory = folder / "name.shards"
    return Work(data, folder, tokenizer, settings, directory, cache.builder(os.getpid()))


def alone(data: TextData, tokenizer: Tokenizer, settings: Packing, target: Path) -> dict[str, Any]:
    """Return what this process makes of a corpus without any shards: its files and its counts."""
    target.mkdir()
    reading = Reading()
    pieces = read_corpus(data, target, reading)
    counts = packing.pack(pieces, len(data.paths), tokenizer, settings, target)
    counts["encoder"] = counts["encoder"]["name"]  # which each process compares on its own texts
    return {**files(target), "counts": {**counts, **vars(reading)}}


def together(data: TextData, work: Work, target: Path, cores: int = 1) -> dict[str, Any]:
    """Return what processes make of it, as many as ``cores``: this machine may have fewer."""
    target.mkdir()
    divided = shards_of(data, target)
    assert len(divided) > 10
    given = {CORE + i for i in range(cores)}
    assert shards.are_worth_processes(divided, given, target / "none")
    counts = shard_workers.pack(divided, work, len(data.paths), target, given)
    counts["encoder"] = counts["encoder"]["name"]
    return {**files(target), "counts": counts}


def files(directory: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["documents", "words", "lines"])
def test_any_number_of_processes_makes_the_same_bytes(
    kind: str, bpe: Tokenizer, mixed: TextData, tmp_path: Path
) -> None:
    settings = dataclasses.replace(
        PLAIN, words=kind != "documents", by_line=kind == "lines", documents=kind == "documents"
    )
    mixed = mixed.model_copy(update={"line_by_line": kind == "lines"})
    expected = alone(mixed, bpe, settings, tmp_path / "alone")
    assert expected["counts"]["empty_files"] == 1
    assert all(len(expected[f"{part}-0.uint16"]) > 100 for part in ("train", "heldout"))
    for processes in {"documents": (1, 2), "words": (3,), "lines": (2,)}[kind]:
        work = work_of(mixed, bpe, settings, tmp_path / f"cache-{processes}")
        found = together(mixed, work, tmp_path / f"of-{processes}", processes)
        assert found == expected
        assert list(found["counts"]) == list(expected["counts"])


def test_a_large_file_that_is_not_divided_is_left_to_one_reader(tmp_path: Path) -> None:
    """Which hands what it reads to every core; but not where a part of the work is done."""
    large, small = (Shard((Span(0, "a", size),)) for size in (10 * 2**30, 2**24))

    def are(shards_: list[Shard], cores: int, directory: Path = tmp_path / "none") -> bool:
        return shards.are_worth_processes(shards_, set(range(cores)), directory)

    assert are([small, small], 4)
    assert not are([large, small], 4)
    assert are([large, small], 4, tmp_path)
    assert are([large, small], 2)
    assert not are([large], 1)
    assert not are([large], 1, tmp_path)
    assert not are([Shard((Span(0, "a", 2**20),))] * 3, 1)


def test_what_is_damaged_is_made_again_and_nothing_else(
    bpe: Tokenizer, mixed: TextData, tmp_path: Path
) -> None:
    work = work_of(mixed, bpe, PLAIN, tmp_path / "cache")
    expected = together(mixed, work, tmp_path / "first")
    whole = sorted(work.directory.iterdir())
    made_at = made_when(work.directory)
    tokens = whole[1] / "train-0.uint16"
    tokens.write_bytes(b"\0\1" + tokens.read_bytes()[2:])
    (whole[2] / "index.json").write_text("{")
    shutil.rmtree(whole[3])
    (whole[4] / "train-0.uint16").write_bytes(b"")
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = work.directory / f"000001.tmp-{cache.builder(dead.pid)}"
    stale.mkdir()
    assert together(mixed, work, tmp_path / "second", 2) == expected
    assert not stale.exists()
    now = made_when(work.directory)
    changed = {name for name in now if now[name] != made_at[name]}
    assert changed == {path.name for path in whole[1:5]}


def test_a_shard_of_other_texts_is_not_taken(
    bpe: Tokenizer, mixed: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version may have divided the corpus."""
    work = work_of(mixed, bpe, PLAIN, tmp_path / "cache")
    expected = together(mixed, work, tmp_path / "first")
    monkeypatch.setattr(of_corpus, "LEAST_BYTES", 800)
    assert together(mixed, work, tmp_path / "second") == expected


def test_a_shard_that_changes_before_it_is_joined_is_made_again(
    bpe: Tokenizer, mixed: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(mixed, bpe, PLAIN, tmp_path / "cache")
    expected = together(mixed, work, tmp_path / "first")
    real, calls = shard_workers.make, list[int]()

    def make(*arguments: Any) -> dict[int, Made]:
        made = real(*arguments)
        if not calls:
            calls.append(1)
            path = shards.path_of(work.directory, 5) / "train-0.uint16"
            path.write_bytes(b"\0\1" + path.read_bytes()[2:])
        return made

    monkeypatch.setattr(shard_workers, "make", make)
    assert together(mixed, work, tmp_path / "second") == expected


def test_the_first_error_is_raised_and_the_shards_before_it_are_kept(
    bpe: Tokenizer, mixed: TextData, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = path.read_text().split("\n")
    lines[40] = lines[30] = "bad"
    path.write_text("\n".join(lines))
    work = work_of(mixed, bpe, PLAIN, tmp_path / "cache")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 31 is not JSON"):
        together(mixed, work, tmp_path / "first", 2)
    kept = sorted(p.name for p in work.directory.iterdir())
    assert kept
    assert not any("tmp" in name for name in kept)
    assert shards.find(work.directory / kept[0], shards_of(mixed, tmp_path)[0], with_hashes=True)


def test_a_killed_process_is_an_error_that_names_its_shard(
    bpe: Tokenizer, mixed: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **settings))
        return started[-1]

    large = tmp_path / "zz.txt"
    large.write_text((tmp_path / "1.txt").read_text() * 20_000)
    monkeypatch.setattr(shard_workers.subprocess, "Popen", start)
    whole = [*shards_of(mixed, tmp_path)[:3], Shard((Span(1, str(large), 1),))]
    work = work_of(mixed, bpe, PLAIN, tmp_path / "cache")
    real = shard_workers.wait

    def wait(connections: Any) -> Any:
        if len(whole_ones(work.directory)) == 3:
            started[0].kill()
        return real(connections)

    monkeypatch.setattr(shard_workers, "wait", wait)
    with pytest.raises(
        shard_workers.WorkerEnded,
        match=r"killed by SIGKILL \(the kernel .*\) at .*zz\.txt; what is whole, 3 of 4 shards",
    ):
        shard_workers.make(dict(enumerate(whole)), work, {CORE})
    assert all(process.returncode is not None for process in started)
    assert len(whole_ones(work.directory)) == 3


def whole_ones(directory: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(p.name for p in directory.iterdir() if "tmp" not in p.name)
    return []


def made_when(directory: Path) -> dict[str, int]:
    """Return for each shard that is whole when it was made."""
    found = {}
    for name in whole_ones(directory):
        with contextlib.suppress(FileNotFoundError):
            found[name] = (directory / name / "index.json").stat().st_mtime_ns
    return found


def test_the_command_says_what_a_killed_process_was_at(
    make_config: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(*_: Any) -> None:
        raise shard_workers.WorkerEnded("killed at rows.jsonl")

    monkeypatch.setattr(data_command, "prepare", killed)
    assert data_command._prepared(tmp_path, make_config()) == FAILED
    assert capsys.readouterr().err.endswith("error: killed at rows.jsonl\n")


def test_how_far_it_is() -> None:
    """By bytes that characters tell, also of shards that were there already."""
    so_far = shard_workers._SoFar({i: Shard((Span(0, "a", 100),)) for i in range(4)})
    made = Made(
        {"documents": 3, "tokens": 20, "heldout_documents": 1, "heldout_tokens": 5}, {}, {}, {}
    )
    assert so_far.is_made(0, made) == 100
    assert so_far.shown() == (100, {"documents": 4, "tokens": 25})
    so_far.at(1, (30, 2, 10))
    assert so_far.shown() == (130, {"documents": 6, "tokens": 35})
    so_far.at(1, (50, 3, 24))
    assert so_far.is_made(1, made) == 0
    so_far.at(2, (25, 1, 1))
    assert so_far.shown() == (250, {"documents": 9, "tokens": 51})  # two bytes a character
    so_far.at(2, (99, 1, 1))
    assert so_far.shown()[0] == 300


def test_sweeping_keeps_the_shards_that_are_whole(tmp_path: Path) -> None:
    folder = tmp_path / "tokens" / "name.shards"
    for name in ("000001", f"000002.tmp-{cache.builder(7)}", f"000003.tmp-{cache.builder(8)}"):
        (folder / name).mkdir(parents=True)
    cache.remove_leftovers(tmp_path, 7)
    assert sorted(p.name for p in folder.iterdir()) == [
        "000001",
        f"000003.tmp-{cache.builder(8)}",
    ]


# --- killed ---------------------------------------------------------------------------------------

PREPARE = """
import sys
from pathlib import Path
from shardwright.train import config
from shardwright.train.data import prepare
from shardwright.train.data.prepare import prepare_part
from shardwright.train.data.sources import shards
from shardwright.train.data.tokens import packing
from shardwright.train.process import cores

shards.LEAST_BYTES = 3000
packing.SIDE_BY_SIDE_FROM_CHARACTERS = 1
cores._before_binding = set(range(int(sys.argv[2])))
prepare(config.load(Path(sys.argv[1])), Path(sys.argv[1]))
"""


@pytest.fixture
def deduplicates() -> bool:
    """Whether duplicates are left out; a test may say otherwise by a parameter of this name."""
    return False


@pytest.fixture
def start(
    corpus: Path,
    make_config: Callable[..., Any],
    tmp_path: Path,
    sentences: Callable[..., str],
    deduplicates: bool,
) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Return ``f(cores)``, which starts a preparation of many shards."""
    distinct = 300 if deduplicates else 400
    rows = (json.dumps({"text": sentences(8, seed=i % distinct)}) for i in range(400))
    (corpus / "rows.jsonl").write_text("\n".join(rows))
    paths = [str(corpus / "*.txt"), str(corpus / "rows.jsonl")]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    data = {"paths": paths, "deduplicate": deduplicates}
    (run_dir / "config.yaml").write_text(to_yaml(make_config(data=data)))
    started: list[subprocess.Popen[bytes]] = []

    def start(cores: int) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", PREPARE, str(run_dir), str(cores)]
        started.append(subprocess.Popen(argv, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def group(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the living processes of the group that a process leads."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, members = path.read_bytes().rpartition(b")")[2].split()[:3]
            if int(members) == process.pid and state != b"Z":
                found.append(int(path.parent.name))
    return found


def killed(process: subprocess.Popen[bytes], victim: int) -> None:
    """Kill one of them, and wait until all that descends from it has ended with it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 30
    while group(process):
        assert time.monotonic() < until, "processes are left that nobody needs"
        time.sleep(0.01)


def entry_of(tokens: Path) -> Path:
    (index,) = tokens.glob("*/index.json")
    return index.parent


def assert_survives(
    kills: Iterator[Callable[[subprocess.Popen[bytes], Path], int | None]],
    start: Callable[[int], subprocess.Popen[bytes]],
    tmp_path: Path,
) -> int:
    """Kill preparations, then let one end: the bytes are those of one that was left alone.

    Each of ``kills`` waits for its moment and returns whom to kill. Returns how many were killed
    before the end.
    """
    tokens, run_dir = tmp_path / "cache" / "tokens", tmp_path / "run"
    whole = tmp_path / "whole"
    whole.mkdir()
    prepare(config.load(run_dir), whole)
    expected = files(entry_of(tokens))
    assert not list(tokens.glob("*.shards"))
    folder = tokens / f"{entry_of(tokens).name}.shards"
    shutil.rmtree(entry_of(tokens))
    killed_count = 0
    kept: dict[str, int] = {}
    for kill in kills:
        (run_dir / "data.json").unlink(missing_ok=True)
        process = start(2)
        victim = kill(process, folder)
        if victim is not None:
            killed(process, victim)
            killed_count += 1
        else:
            assert process.wait() == 0
        if list(tokens.glob("*/index.json")):  # it was done before it was killed
            assert files(entry_of(tokens)) == expected
            shutil.rmtree(entry_of(tokens))
            shutil.rmtree(folder, ignore_errors=True)
            kept = {}
        now = made_when(folder)
        assert kept.items() <= now.items(), "a whole shard was made again"
        kept = now
    (run_dir / "data.json").unlink(missing_ok=True)
    assert start(3).wait() == 0
    assert files(entry_of(tokens)) == expected
    assert not list(tokens.glob("*.shards"))
    assert not list(tokens.glob("*tmp*"))
    return killed_count


def test_what_was_killed_is_continued(
    start: Callable[[int], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Once the process that hands out shards, once one that makes them."""

    def kill(process: subprocess.Popen[bytes], folder: Path, of_workers: bool) -> int:
        until = time.monotonic() + 60
        before = len(whole_ones(folder))
        while len(whole_ones(folder)) < before + 3:
            assert process.poll() is None
            assert time.monotonic() < until
        workers = [pid for pid in group(process) if pid != process.pid]
        return min(workers, default=process.pid) if of_workers else process.pid

    kills = iter([functools.partial(kill, of_workers=flag) for flag in (False, True)])
    assert assert_survives(kills, start, tmp_path) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("deduplicates", [False, True], ids=["all", "unique"])
def test_fifty_kills_at_random_moments(
    deduplicates: bool, start: Callable[[int], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    draw = random.Random(0)
    seconds: list[float] = []

    def kill(process: subprocess.Popen[bytes], folder: Path) -> int | None:
        begun = time.monotonic()
        before = len(whole_ones(folder))
        # From when the first is made on, else most kills would be of imports.
        while process.poll() is None and len(whole_ones(folder)) <= before:
            time.sleep(0.001)
            if time.monotonic() - begun > draw.uniform(2, 12):
                break
        time.sleep(draw.uniform(0, 0.2))
        seconds.append(time.monotonic() - begun)
        if process.poll() is not None:
            return None
        found = group(process)
        return draw.choice(found) if found else None

    assert assert_survives(iter([kill] * 50), start, tmp_path) > 25
    details = json.loads((entry_of(tmp_path / "cache" / "tokens") / "index.json").read_text())
    assert (details["details"].get("duplicates", 0) >= 100) == deduplicates


# --- over nodes -----------------------------------------------------------------------------------


def test_parts_make_their_own_shards_and_the_last_joins_them(
    corpus: Path, make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part is never made, and one comes when all is done."""
    monkeypatch.setattr(cores, "_before_binding", {CORE})
    tokens = tmp_path / "cache" / "tokens"
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    settings = make_config()
    prepare(settings, tmp_path / "whole")
    expected = files(entry_of(tokens))
    name = entry_of(tokens).name
    shutil.rmtree(tokens / name)
    monkeypatch.setattr(of_corpus, "LEAST_BYTES", 20_000)
    folder = tokens / f"{name}.shards"
    count = len(shards_of(settings.data, tmp_path))
    assert count > 5
    prepare_part(settings, tmp_path / "run", 1, 3)
    assert whole_ones(folder) == [f"{number:06}" for number in range(1, count, 3)]
    before = made_when(folder)
    prepare_part(settings, tmp_path / "run", 0, 3)
    assert before.items() <= made_when(folder).items()
    prepare(settings, tmp_path / "run")
    assert files(entry_of(tokens)) == expected
    assert not folder.exists()
    prepare_part(settings, tmp_path / "run", 2, 3)
    assert not folder.exists()
