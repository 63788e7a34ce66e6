"""DeepSpeed's CPU Adam is compiled in the rank: what can go wrong with that."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.strategy.deepspeed_ops import LONGEST_BUILD_SECONDS, ready_to_build

BUILD = """
import torch
from train.errors import UserError
from train.strategy.zero import deepspeed_cpu_adam

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


def test_the_lock_of_a_killed_build_is_removed_and_that_of_a_running_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])  # restored afterwards
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    ready_to_build("cpu_adam")
    assert lock.exists()
    before = time.time() - LONGEST_BUILD_SECONDS - 1
    os.utime(lock, (before, before))
    ready_to_build("cpu_adam")
    assert not lock.exists()
    ready_to_build("cpu_adam")
    assert "DeepSpeed compiles its operator cpu_adam, once: this takes minutes" in caplog.text
