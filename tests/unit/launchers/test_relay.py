"""A signal to the parent of a launcher reaches the ranks below it, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.launchers.ranks import child
from tests.unit.launchers.fakes import ROOT

# A launcher that dies of SIGUSR1, as torchrun does; a rank with a child of its own that does too.
LAUNCHER = """
import os, subprocess, sys
ranks = []
for rank in "01":
    environment = {**os.environ, "RANK": rank, "LOCAL_RANK": rank}
    ranks.append(subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]],
                                  env=environment, start_new_session=True))
sys.exit(max(rank.wait() for rank in ranks))
"""
RANK = """
import os, signal, subprocess, sys, time
from pathlib import Path
directory, rank, seconds = Path(sys.argv[1]), os.environ["RANK"], float(sys.argv[2])
(directory / f"began-{rank}").touch()
time.sleep(seconds)  # of imports
got = []
signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
signal.signal(signal.SIGUSR2, lambda number, frame: (directory / f"profile-{rank}").touch())
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, signal.SIGUSR2])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
(directory / f"ready-{rank}").touch()
while not got:
    time.sleep(0.01)
time.sleep(float(sys.argv[3]))  # of a save
(directory / f"saved-{rank}").write_text(str(child.wait()))
sys.exit(75)
"""

Relay = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def relay(tmp_path: Path) -> Relay:
    """Return a function that starts two ranks below a launcher below a relay."""

    def run(
        *options: str, imports: float = 0.0, save: float = 0.0, **environment: str
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", LAUNCHER, RANK, str(tmp_path), str(imports), str(save)]
        return subprocess.Popen(
            [sys.executable, "-m", "shardwright.launchers.relay", *options, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    return run


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_the_ranks_get_it_and_their_exit_code_comes_back(
    relay: Relay, tmp_path: Path, number: signal.Signals
) -> None:
    process = relay()
    for rank in range(2):
        wait_for(tmp_path / f"ready-{rank}")
    process.send_signal(number)
    assert process.wait(60) == 75
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == ["0", "0"]


def test_what_asks_for_a_profile_gets_to_the_ranks_and_stops_nothing(
    relay: Relay, tmp_path: Path
) -> None:
    process = relay(imports=1.0)
    wait_for(tmp_path / "began-1")
    process.send_signal(signal.SIGUSR2)  # which a rank that does not listen yet gets later
    for rank in range(2):
        wait_for(tmp_path / f"profile-{rank}")
        wait_for(tmp_path / f"ready-{rank}")
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75


def test_one_to_the_launcher_alone_is_told_to_the_ranks(relay: Relay, tmp_path: Path) -> None:
    process = relay()
    for rank in range(2):
        wait_for(tmp_path / f"ready-{rank}")
    (launcher,) = (p for p in child.descendants(process.pid) if parent(p) == process.pid)
    os.kill(launcher, signal.SIGUSR1)
    assert process.wait(60) == 75
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == ["0", "0"]


def test_a_rank_that_does_not_listen_yet_gets_it_later(relay: Relay, tmp_path: Path) -> None:
    process = relay(imports=1.0, RANK="0")  # as Kubernetes' operators set for a node
    wait_for(tmp_path / "began-1")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75


def test_the_second_changes_nothing_and_the_grace_period_ends_it(
    relay: Relay, tmp_path: Path
) -> None:
    process = relay("--grace-seconds", "1", save=60)
    wait_for(tmp_path / "ready-1")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 128 + signal.SIGKILL
    assert not list(tmp_path.glob("saved-*"))


def test_a_second_ctrl_c_kills(relay: Relay, tmp_path: Path) -> None:
    process = relay(save=60)
    wait_for(tmp_path / "ready-1")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(20) == 128 + signal.SIGKILL
