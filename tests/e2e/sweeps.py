"""Sweeps of real runs of a few steps: what they log, and how they are cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardwright.launchers.sweep import directory
from tests.e2e import cli

STEPS = 8


def words(tiny: tuple[str, ...], *more: str) -> list[str]:
    """Return what all points of a sweep have in common: a run of a few steps, saved in it."""
    kept = [word for word in tiny if not word.startswith(("run_dir=", "trainer.max_steps="))]
    return [
        *cli.on_one_rank(kept),
        "precision=fp32",
        f"trainer.max_steps={STEPS}",
        "trainer.save_every_steps=2",
        "trainer.eval_every_steps=4",
        "checkpoint.keep_last=1",
        *more,
    ]


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, of evaluations too."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(sweep_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the losses of each point, of its held-out documents too, by its settings."""
    return {
        point.label: [
            (line["step"], line[name])
            for line in logged(sweep_dir / str(point.number))
            for name in ("loss", "eval_loss")
            if name in line
        ]
        for point in directory.read(sweep_dir).points
    }


def steps(run_dir: Path) -> list[int]:
    """Return the steps that a run has logged the loss of, in its order."""
    return [line["step"] for line in logged(run_dir) if "loss" in line]


def progress(sweep_dir: Path) -> int:
    """Return how many steps all points have logged together."""
    return sum(len(steps(path.parent)) for path in sweep_dir.glob("*/metrics.jsonl"))


def kill(process: subprocess.Popen[str], cwd: Path) -> None:
    """Kill a sweep and all that descends from it at once: no part hears of another's end."""
    process.send_signal(signal.SIGSTOP)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in cli.processes(cwd):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
    process.wait()
    cli.wait_until(lambda: not list(cli.processes(cwd)))


def cut(
    words: list[str], cwd: Path, when: Callable[[], bool], after_seconds: float = 0.0
) -> subprocess.Popen[str]:
    """Start a sweep, and kill it some time after something holds."""
    process = cli.start("sweep", *words, cwd=cwd)
    cli.wait_until(lambda: when() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    time.sleep(after_seconds)
    kill(process, cwd)
    return process
