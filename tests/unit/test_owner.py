"""One live run in a directory: the second is refused, and no end of the first stands in the way."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from shardwright.launchers.__main__ import main
from shardwright.train import __main__ as rank
from shardwright.train.errors import BAD_INPUT, UserError
from shardwright.train.run_directory.owner import FILE, Owner, inherited, look, owned
from tests.unit.trees import TREE

ROOT = Path(__file__).parents[2]
OWNER = """
import os, sys, time
from pathlib import Path
from shardwright.train.run_directory.owner import owned

with owned(Path(sys.argv[1]), print):
    worker = os.fork()  # as a data loader's is, which outlives a killed rank for a while
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwright.train.run_directory.owner.DYING_SECONDS", 0.3)
    monkeypatch.setattr("shardwright.train.run_directory.owner.LEASE_SECONDS", 0.6)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a process which owns ``tmp_path``, and has forked another."""
    started: list[tuple[subprocess.Popen[str], int]] = []

    def start(**environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        started.append((process, int(process.stdout.readline())))
        return process

    yield start
    for process, worker in started:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        process.communicate()


def claim(run_dir: Path) -> list[str]:
    """Own the directory for a moment; return what is said of waiting."""
    said: list[str] = []
    with owned(run_dir, said.append):
        assert json.loads((run_dir / FILE).read_text())["pid"] == os.getpid()
    return said


def test_a_second_run_is_told_whose_the_directory_is(owner: Start, tmp_path: Path) -> None:
    first = owner()
    with pytest.raises(UserError) as refused:
        claim(tmp_path)
    assert re.fullmatch(
        rf"{tmp_path} belongs to a run that is alive \(process {first.pid} on "
        rf"{socket.gethostname()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\); wait until it has "
        r"ended, or "
        rf"stop it first: `shardwright cancel {tmp_path}`",
        str(refused.value),
    )


def test_a_job_is_named(owner: Start, tmp_path: Path) -> None:
    owner(SLURM_JOB_ID="77")
    with pytest.raises(
        UserError, match=r", SLURM job 77, since .* it first: `shardwright cancel .*`$"
    ):
        claim(tmp_path)


def test_nothing_is_left_of_an_owner_that_was_killed(owner: Start, tmp_path: Path) -> None:
    for _ in range(2):
        killed = owner()
        killed.kill()
        killed.wait()
        assert claim(tmp_path) == []


def test_an_owner_that_is_just_dying_is_waited_for(owner: Start, tmp_path: Path) -> None:
    dying = owner()
    threading.Timer(0.1, dying.kill).start()
    (said,) = claim(tmp_path)
    assert said.startswith(f"{tmp_path} belongs to process {dying.pid} on ")
    assert said.endswith(": waiting up to 0.3 s until it has ended")


def test_a_node_that_may_have_died_is_waited_for_longer(owner: Start, tmp_path: Path) -> None:
    """Its file server takes its locks back only when it has not heard of it for a while."""
    first = owner()
    note = tmp_path / FILE
    note.write_text(json.dumps({**json.loads(note.read_text()), "host": "node-7"}))
    with pytest.raises(UserError, match=f"process {first.pid} on node-7"):
        claim(tmp_path)
    threading.Timer(0.4, first.kill).start()
    (said,) = claim(tmp_path)
    assert "on node-7" in said
    assert said.endswith(": waiting up to 0.6 s until it has ended")


LAUNCHER = """
import sys
from pathlib import Path
from shardwright.train.run_directory import owner

with owner.owned(Path(sys.argv[1]), print, owner.PREPARING) as claim:
    print("prepares", flush=True)
    sys.stdin.readline()
    claim.hand_on()
    print("starts", flush=True)
    sys.stdin.readline()
"""


def test_a_launcher_owns_its_run_from_the_first_file_to_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets its own first rank in, and nobody else, also before that rank is there."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    of_its_children = inherited(claim=None)
    try:
        assert launcher.stdout.readline() == "prepares\n"
        assert look(tmp_path) == (owner_of(tmp_path), True)
        with pytest.raises(UserError, match=r"is alive \(process \d+ on .*, preparing data, since"):
            claim(tmp_path)

        launcher.stdin.write("\n")
        launcher.stdin.flush()
        assert launcher.stdout.readline() == "starts\n"
        with pytest.raises(UserError, match="starting its ranks, since"):
            claim(tmp_path)
        for name, value in of_its_children.items():
            monkeypatch.setenv(name, value)
        assert claim(tmp_path) == []  # which notes itself, and ends
        for name in of_its_children:
            monkeypatch.delenv(name)
        with pytest.raises(UserError, match="is alive"):
            claim(tmp_path)
    finally:
        launcher.communicate("\n")
    assert not look(tmp_path)[1]
    assert claim(tmp_path) == []


def owner_of(run_dir: Path) -> Owner:
    return Owner(**json.loads((run_dir / FILE).read_text()))


def test_neither_a_rank_nor_resume_touches_a_run_that_is_alive(
    owner: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TREE))
    first = owner()
    before = sorted(tmp_path.iterdir())
    for start in (lambda: rank.main([str(tmp_path)]), lambda: main(["resume", str(tmp_path)])):
        assert start() == BAD_INPUT
        assert f"belongs to a run that is alive (process {first.pid} " in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before


def test_a_file_system_without_locks_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING):
        claim(tmp_path)
    assert "has no locks (No locks available): nothing keeps a second run out" in caplog.text
