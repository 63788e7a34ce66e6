"""A run whose first rank is another machine's is stopped through a file in its directory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardwright.launchers.commands import cancel
from shardwright.launchers.ranks.child import descendants
from shardwright.train.process import signals
from shardwright.train.run_directory import stop_note, stop_request
from tests.unit.launchers.fakes import ROOT, Shardwright, make_shardwright
from tests.unit.launchers.run_directories import a_run

shardwright = pytest.fixture(make_shardwright)

# Nothing tells that it is of this machine: neither its parent nor its arguments.
FIRST_RANK = """
import contextlib, os, sys, time
from pathlib import Path
from shardwright.train.run_directory import owner
from shardwright.train.process import signals
from shardwright.train.process.agreement import reason
from shardwright.train.run_directory import stop_note
from shardwright.train.process.stop_request import watch_for_stop

signals.install()
run_dir, what = Path(os.environ["RUN"]), sys.argv[1:]
owned = owner.owned(run_dir, print) if "without lock" not in what else contextlib.nullcontext()
with owned, watch_for_stop(run_dir):
    print("heeds", flush=True)
    try:
        with signals.at_once() if "at once" in what else contextlib.nullcontext():
            while not signals.asked() or "hang" in what:
                time.sleep(0.01)
    except signals.Stop:
        pass
    stop_note.Stopped(7, 56, reason([signals.asked(), None]), 0.0, None, 7).write(run_dir)
sys.exit(75)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def first_rank(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts the first rank of ``tmp_path / "run"``, which then heeds."""
    started: list[subprocess.Popen[str]] = []
    run_dir = a_run(tmp_path / "run")

    def start(*what: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", FIRST_RANK, *what],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RUN": str(run_dir)},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "heeds\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("what", ["a step at a time", "at once"])
def test_a_request_is_like_a_signal_and_reaches_one_start_alone(
    first_rank: Start, tmp_path: Path, what: str
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / stop_request.FILE).write_text("SIGTERM of an earlier start\n")
    process = first_rank(what)
    time.sleep(2 * signals.SECONDS_BETWEEN_LOOKS)
    assert process.poll() is None
    assert stop_request.request(run_dir, "SIGTERM to the launcher on node7")
    stop_request.request(run_dir, "another one, later")
    assert process.wait(20) == 75
    where = stop_note.read(run_dir)
    assert where is not None
    assert where.reason == "SIGTERM to the launcher on node7"
    assert not stop_request.request(run_dir, "too late")
    assert not (run_dir / stop_request.FILE).exists()


@pytest.mark.parametrize("sees_locks", [True, False])
def test_cancelling_a_run_of_another_machine(
    first_rank: Start, tmp_path: Path, shardwright: Shardwright, sees_locks: bool
) -> None:
    run_dir = tmp_path / "run"
    if not sees_locks:
        note = {"host": "node7", "pid": 1, "since": time.time(), "slurm_job": None}
        (run_dir / "owner.json").write_text(json.dumps(note))
        (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 7, "time": time.time()}) + "\n")
    process = first_rank(*["without lock"] * (not sees_locks))
    outcome = shardwright("cancel", "run")
    assert outcome.code == 0
    assert "stopped at step 7; resume with: shardwright resume" in outcome.out
    assert process.wait(20) == 75
    where = stop_note.read(run_dir)
    assert where is not None
    assert where.reason == f"shardwright cancel on {socket.gethostname()}"


def test_ending_a_run_of_another_machine_at_once(
    first_rank: Start, shardwright: Shardwright
) -> None:
    process = first_rank("hang")
    os.kill(process.pid, signal.SIGUSR1)
    outcome = shardwright("cancel", "run", "--now")
    assert outcome.code == 0
    assert "ended; resume with: shardwright resume" in outcome.out
    assert process.wait(20) == -signal.SIGKILL


def test_the_launcher_kills_what_has_not_stopped_within_the_grace_period(
    first_rank: Start, tmp_path: Path
) -> None:
    rank = first_rank("hang")
    script = (
        "import sys; from pathlib import Path; from shardwright.launchers.ranks import child\n"
        "child.run(['sleep', '60'], {}, grace_seconds=1, run_dir=Path(sys.argv[1]), "
        "is_elsewhere=True)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], cwd=ROOT)
    while b"sleep" not in b"".join(map(_command, descendants(launcher.pid))):
        time.sleep(0.02)
    launcher.terminate()
    assert launcher.wait(20) == 0
    assert rank.wait(20) == -signal.SIGKILL


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_run_that_was_killed_here_is_not_taken_for_another_machines(
    first_rank: Start, tmp_path: Path, shardwright: Shardwright
) -> None:
    process = first_rank()
    line = {"step": 7, "time": time.time()}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    process.kill()
    process.wait()
    outcome = shardwright("cancel", "run")
    assert outcome.code == 2
    assert "no process here or elsewhere" in outcome.err


def test_the_rest_of_a_grace_period_is_waited_for(
    first_rank: Start, shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = first_rank()
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(cancel, "SLACK_SECONDS", -119.0)
    outcome = shardwright("cancel", "run")
    assert outcome.code == 1
    assert "it has not stopped within 1 s" in outcome.err
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(20) == 75
