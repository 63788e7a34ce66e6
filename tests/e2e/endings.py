"""How a run must have ended."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from shardwright.train.checkpoint.format import layout
from shardwright.train.run_directory import stop_note
from tests.e2e.cli import processes


def assert_stopped(ended: subprocess.CompletedProcess[str], run_dir: Path) -> stop_note.Stopped:
    """The launcher kills at the end of the grace period: a clean end is one within it."""
    where = stop_note.read(run_dir)
    assert where is not None, ended
    assert where.checkpoint == str(run_dir / "checkpoints" / f"checkpoint-{where.step}")
    assert layout.what_is_wrong(Path(where.checkpoint)) is None
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not (run_dir / "final").exists()
    assert_all_gone(run_dir.parent)
    return where


def assert_all_gone(cwd: Path) -> None:
    """A process that was killed takes a moment to leave /proc."""
    deadline = time.monotonic() + 10
    while left := list(processes(cwd)):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)
