"""DeepSpeed's CPU Adam is compiled in the rank: what can go wrong with that."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from shardwright.train.strategy.zero.operators import (
    QUIET_SECONDS,
    is_abandoned,
    is_open,
    ready_to_build,
)

BUILD = """
import torch
from shardwright.train.errors import UserError
from shardwright.train.strategy.zero.adam import deepspeed_cpu_adam

weights = torch.nn.Parameter(torch.zeros(8))
try:
    deepspeed_cpu_adam([{"params": [weights]}], moments_dtype="fp32", lr=1e-3)
except UserError as error:
    print(error)
"""


def test_without_a_compiler_it_says_what_to_do(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", BUILD],
        env={
            "PATH": str(tmp_path),
            "HOME": str(tmp_path),
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
            "DS_ACCELERATOR": "cpu",
        },
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "strategy.cpu_adam=deepspeed cannot be compiled here (" in ended.stdout
    assert "install a C++ compiler and ninja, or set strategy.cpu_adam=torch" in ended.stdout


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the lock of a build of cpu_adam that began in another time."""
    monkeypatch.setenv("PATH", os.environ["PATH"])  # restored afterwards
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    _age(lock, QUIET_SECONDS + 1)
    return lock


def _age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_the_lock_of_a_killed_build_is_removed(
    lock: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ready_to_build("cpu_adam")
    assert not lock.exists()
    assert f"{lock} was left by a build that was killed: removed" in caplog.text
    assert "DeepSpeed compiles its operator cpu_adam, once: this takes minutes" in caplog.text


def test_a_build_on_this_machine_is_waited_for_however_long_it_takes(
    lock: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As torch holds it, in another process.
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; f = open(sys.argv[1]); sys.stdin.read()", str(lock)],
        stdin=subprocess.PIPE,
    )
    while not is_open(lock):
        time.sleep(0.01)
    waiting = threading.Thread(target=ready_to_build, args=("cpu_adam",))
    waiting.start()
    while f"waiting for the build that holds {lock}" not in caplog.text:
        time.sleep(0.01)
    assert lock.exists()
    assert waiting.is_alive()
    holder.kill()
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    assert not lock.exists()
    holder.communicate()


def test_a_build_elsewhere_shows_itself_by_what_it_writes(lock: Path) -> None:
    source = lock.parent / "cpu_adam.o"
    source.touch()
    assert not is_abandoned(lock)
    _age(source, QUIET_SECONDS + 1)
    assert is_abandoned(lock)


def test_torch_holds_its_lock_open(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    baton = FileBaton(str(path))
    assert baton.try_acquire()
    assert is_open(path)
    baton.release()
    assert not path.exists()
