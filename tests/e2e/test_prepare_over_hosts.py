"""Data that the hosts of a hostfile prepare together, over an ssh server of the test's own."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.cli import TINY, crash, finish, shardwright, start, wait_until
from tests.e2e.ssh import ADDRESSES, needs_ssh

pytestmark = needs_ssh

# Found by every Python of a preparation, on each host: a corpus that no test could wait for.
SMALL_SHARDS = """
from shardwright.train.data.sources import shards
shards.LEAST_BYTES = 50_000
"""
# Documents behind the first ones are held up until a file is there.
FILTER = """
import time
from pathlib import Path

def keep(text):
    while "hold" in text and not Path({gate!r}).exists():
        time.sleep(0.01)
    return True
"""
FREE_SHARDS = 6


class Prepared:
    """A corpus, and the command that prepares it over two hosts."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.gate = folder, folder / "gate"
        self.started: list[subprocess.Popen[str]] = []
        (folder / "packages").mkdir()
        (folder / "packages" / "sitecustomize.py").write_text(SMALL_SHARDS)
        (folder / "quality.py").write_text(FILTER.format(gate=str(self.gate)))
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefgijk", k=draw.randrange(2, 9))) for _ in range(500)]
        with (folder / "rows.jsonl").open("w") as rows:
            while rows.tell() < 700_000:
                held = ["hold"] if rows.tell() > (FREE_SHARDS + 0.5) * 50_000 else []
                text = " ".join([*held, *draw.choices(words, k=100)])
                rows.write(json.dumps({"text": text}) + "\n")
        hosts = folder / "hosts"
        hosts.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        self.settings = (
            *("prepare", "model=gpt2_tiny", "objective=clm", *TINY, "data=text"),
            *("data.paths=[rows.jsonl]", "data.filter=quality.py:keep", "data.sequence_length=32"),
            "tokenizer.max_training_bytes=50000",
        )
        self.over_hosts = (
            *(*self.settings, "data.cache_dir=cache", "launcher=deepspeed"),
            *(f"launcher.hostfile={hosts}", f"launcher.ssh_port={port}", "run_dir=prepared"),
        )

    def start(self, *more: str) -> subprocess.Popen[str]:
        packages = [self.folder / "packages"]
        self.started.append(start(*self.over_hosts, *more, cwd=self.folder, packages=packages))
        return self.started[-1]

    def whole(self) -> dict[str, int]:
        """Return for each shard that is whole when it was made."""
        found = self.folder.glob("cache/tokens/*.shards/[0-9]*/index.json")
        return {p.parent.name: p.stat().st_mtime_ns for p in found if "tmp" not in p.parent.name}

    def tokens(self, cache: str) -> dict[str, bytes]:
        (index,) = self.folder.glob(f"{cache}/tokens/*/index.json")
        return {path.name: path.read_bytes() for path in index.parent.iterdir()}


@pytest.fixture
def prepared(tmp_path: Path, ssh_port: int) -> Iterator[Prepared]:
    made = Prepared(tmp_path, ssh_port)
    yield made
    for launcher in made.started:
        if launcher.poll() is None:  # the test has failed
            crash(launcher)


def processes(*words: str) -> list[int]:
    """Return the processes that have all of some words on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if {word.encode() for word in words} <= set(line):
            found.append(int(path.parent.name))
    return found


def of(part: int, run_dir: Path) -> Sequence[int]:
    return processes("shardwright.train.data", str(run_dir), f"--part={part}/2")


@pytest.mark.wide
def test_two_hosts_prepare_what_one_process_would(prepared: Prepared, tmp_path: Path) -> None:
    """Once without one of them, and then to the end."""
    run_dir = tmp_path / "prepared"
    first = prepared.start()
    wait_until(lambda: len(prepared.whole()) >= FREE_SHARDS - 1 or first.poll() is not None)
    assert first.poll() is None, finish(first)
    kept = prepared.whole()
    assert len({int(name) % 2 for name in kept}) == 2, "each host makes every second one"
    line = run_dir / "logs" / "progress.txt"
    wait_until(lambda: line.exists() and " documents, " in line.read_text())
    state = " ".join(shardwright("status", str(run_dir), cwd=tmp_path).stdout.split())
    far = r"[\d,]+ documents, [\d,]+ tokens, [\d.]+ kB of 7\d\d kB, [\d.]+ .?B/s, .* left"
    far = rf"preparing data on {socket.gethostname()}: tokenising: {far}"
    assert re.search(far, state), state
    prepared.gate.touch()
    for pid in of(1, run_dir):
        os.kill(pid, signal.SIGKILL)
    ended = finish(first)
    assert ended.returncode == 1, ended
    assert f"error: {ADDRESSES[1]} was lost, or its process killed" in ended.stderr
    assert f"error: {ADDRESSES[0]} " not in ended.stderr
    assert "preparing the data failed: a tokenizer that is whole is kept" in ended.stderr
    assert not run_dir.exists()
    now = prepared.whole()
    assert kept.items() <= now.items(), "a whole shard was made again"
    assert {f"{number:06}" for number in range(0, 14, 2)} <= now.keys()

    ended = finish(prepared.start())
    assert ended.returncode == 0, ended.stderr
    assert "each of 2 nodes makes a part" in ended.stderr
    assert ended.stdout.startswith(f"  tokens      {tmp_path}/cache/tokens/")
    assert not run_dir.exists()
    ended = shardwright(*prepared.settings, "data.cache_dir=alone", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert prepared.tokens("cache") == prepared.tokens("alone")
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {"tokens", "tokenizers"}


def test_a_host_that_is_not_reached_is_named_at_once(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.77 slots=1\n")
    ended = finish(prepared.start())
    assert ended.returncode == 1, ended
    assert "error: 127.0.0.77 was not reached (ssh: connect to host 127.0.0.77" in ended.stderr
    assert "leave it out by launcher.exclude=127.0.0.77" in ended.stderr
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_hosts_end_with_who_has_started_them(
    number: signal.Signals, prepared: Prepared, tmp_path: Path
) -> None:
    run_dir = tmp_path / "prepared"
    launcher = prepared.start()
    wait_until(lambda: len(of(0, run_dir)) + len(of(1, run_dir)) == 4)
    launcher.send_signal(number)
    ended = finish(launcher)
    if number == signal.SIGINT:
        assert ended.returncode == 75, ended
        assert "stopping 2 nodes; Ctrl-C again kills" in ended.stderr
        assert "stopped by Ctrl-C: a tokenizer that is whole is kept" in ended.stderr
        assert not run_dir.exists()
    wait_until(lambda: not of(0, run_dir) and not of(1, run_dir))
