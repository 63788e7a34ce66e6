"""What a signal does to one process: it leaves a note, and little else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.train.errors import FAILED
from shardwright.train.process import signals
from shardwright.train.process.agreement import reason
from shardwright.train.run_directory import stop_note
from shardwright.train.run_directory.failures import note_failure

# What each begins with: two ways to be signalled.
PRELUDE = """
import os, signal, sys, time
from shardwright.train.process import signals
def get(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
"""

CASES = {
    "any signal leaves a note, and only the first counts": (
        "signals.install(); get(signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)\n"
        "print(signals.asked(), signals.seconds_since() > 0)",
        "SIGTERM True",
        0,
    ),
    "none, no note": (
        "signals.install(); print(signals.asked(), signals.seconds_since())",
        "None 0.0",
        0,
    ),
    "one that came before the handlers, and was blocked till then, counts": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS); get(signal.SIGUSR1)\n"
        "signals.install(); print(signals.asked())",
        "SIGUSR1",
        0,
    ),
    "one that asks for a profile stops nothing": (
        "signals.install(); get(signal.SIGUSR2, signal.SIGUSR2)\n"
        "with signals.at_once(): print(signals.asked(), signals.take_profile_request())\n"
        "print(signals.take_profile_request())",
        "None True\nFalse",
        0,
    ),
    "a second ctrl-c kills": (
        "signals.install(); get(signal.SIGINT); print(signals.asked(), flush=True)\n"
        "get(signal.SIGINT); print('alive')",
        "Ctrl-C",
        -signal.SIGINT,
    ),
    "one that torchrun passes on is no second ctrl-c": (
        "os.environ['TORCHELASTIC_RUN_ID'] = 'run'\n"
        "signals.install(); get(signal.SIGINT, signal.SIGINT); print(signals.asked())",
        "Ctrl-C",
        0,
    ),
    "what nohup ignores stays ignored": (
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); signals.install(); get(signal.SIGHUP)\n"
        "print(signals.asked())",
        "None",
        0,
    ),
    "work without collectives ends at once, and once": (
        "signals.install()\n"
        "try:\n"
        "    with signals.at_once():\n"
        "        get(signal.SIGTERM); print('went on')\n"
        "except signals.Stop:\n"
        "    get(signal.SIGTERM); print('ended')",
        "ended",
        0,
    ),
    "such work does not begin behind a signal": (
        "signals.install(); get(signal.SIGTERM)\n"
        "try:\n"
        "    with signals.at_once(): print('began')\n"
        "except signals.Stop: print('ended')",
        "ended",
        0,
    ),
    "a rank that has failed goes like any process": (
        "signals.install(); signals.restore_defaults(); get(signal.SIGTERM); print('alive')",
        "",
        -signal.SIGTERM,
    ),
    "one that comes as the interpreter ends does not change the exit code": (
        "class Late:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 15)\n"
        "signals.install(); sys.late = Late(); signals.ignore(); sys.exit(75)",
        "",
        75,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_process_with_a_signal(case: str) -> None:
    script, printed, code = CASES[case]
    ended = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.stdout.strip(), ended.returncode) == (printed, code)
    assert ended.stderr == ""


RANK_0_OF_2 = """
import sys
from datetime import timedelta
from pathlib import Path
from shardwright.train.process import signals
signals.install()
from torch.distributed import TCPStore
from shardwright.train.run_directory.failures import has_failure
with signals.unless(lambda: has_failure(Path(sys.argv[1]), signals.started_at)):
    print("waits", flush=True)
    TCPStore("localhost", 0, 2, is_master=True, timeout=timedelta(seconds=50))
"""


def test_a_rank_that_is_told_to_stop_waits_for_peers_but_not_for_one_that_has_failed(
    tmp_path: Path,
) -> None:
    (tmp_path / "logs").mkdir()
    of_earlier = tmp_path / "logs" / "rank-1.error.json"
    of_earlier.touch()
    os.utime(of_earlier, (0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", RANK_0_OF_2, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=4 * signals.SECONDS_BETWEEN_LOOKS)
    note_failure(tmp_path, 1, ValueError("no such device"))
    _, error = process.communicate(timeout=30)
    assert process.returncode == FAILED
    assert "told to stop, and another rank has failed: not waiting for it" in error


def test_the_note_of_a_stop_round_trips_and_half_of_one_is_none(tmp_path: Path) -> None:
    where = stop_note.Stopped(7, 56, "SIGTERM on rank 0", 1.5, None, 7)
    assert stop_note.read(tmp_path) is None
    where.write(tmp_path)
    assert stop_note.read(tmp_path) == where
    (tmp_path / stop_note.NOTE).write_text('{"step": 7')
    assert stop_note.read(tmp_path) is None
    stop_note.forget(tmp_path)
    assert not list(tmp_path.iterdir())
    stop_note.forget(tmp_path)


def test_the_reason_names_signals_and_ranks() -> None:
    assert reason(["SIGTERM", None, "SIGTERM"]) == "SIGTERM on ranks 0, 2"
    assert reason([None, "SIGUSR1"]) == "SIGUSR1 on rank 1"
    assert reason(["SIGUSR1", "SIGTERM"]) == "SIGUSR1 on rank 0; SIGTERM on rank 1"


def test_torchrun_gets_the_code_that_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start ranks again that end with any other than 0, while it has restarts left."""
    assert not signals.is_restarted_on_failure()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    for restarts, is_restarted in enumerate((True, True, False)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        assert signals.is_restarted_on_failure() is is_restarted
