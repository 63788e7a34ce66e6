"""Small runs on the cluster, and what a test does to them while they train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers.ranks.processes import rank_processes
from tests.e2e.cli import ROOT, TINY, finish
from tests.slurm.cluster import Cluster, until

STEPS = 60
SLURM = ("launcher=slurm", "launcher.time_limit=10")


def overrides(corpus: Path, cache_dir: Path, *, ranks: int = 2) -> tuple[str, ...]:
    """Return the overrides of a run of a few seconds, the same under every launcher."""
    return (
        *("model=gpt2_tiny", "objective=clm", *TINY, "data=text"),
        f"data.paths=['{corpus}']",
        f"data.cache_dir='{cache_dir}'",
        "data.sequence_length=32",
        "data.eval_fraction=0.1",
        f"trainer.max_steps={STEPS}",
        "trainer.global_batch_size=8",
        f"trainer.micro_batch_size={8 // ranks}",
        "trainer.log_every_steps=1",
        "trainer.eval_max_samples=16",
    )


def start(
    cluster: Cluster, *arguments: str, cwd: Path, within: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start `shardwright ...` on the login node, ``within`` a command such as salloc."""
    return subprocess.Popen(
        cluster.on_login(*within, sys.executable, "-m", "shardwright", *arguments),
        cwd=cwd,
        env={
            **os.environ,
            **cluster.environment,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def shardwright(
    cluster: Cluster, *arguments: str, cwd: Path, within: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `shardwright ...` on the login node to its end."""
    return finish(start(cluster, *arguments, cwd=cwd, within=within))


def submitted(cluster: Cluster, *arguments: str, cwd: Path) -> str:
    """Submit a run; return the job's id."""
    ended = shardwright(cluster, "train", *arguments, cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    (job,) = (line.split()[1] for line in ended.stdout.splitlines() if line.startswith("  job "))
    return job.rstrip(",")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl with a loss, so far."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if "loss" in line]


def weights(run_dir: Path) -> bytes:
    """Return the weights of a run that is done, with whatever else is in their file."""
    return (run_dir / "final" / "model.safetensors").read_bytes()


def log(run_dir: Path) -> str:
    """Return the log of a run's jobs."""
    return "".join(path.read_text() for path in sorted((run_dir / "logs").glob("job-*.log")))


def wait_for_step(run_dir: Path, step: int, seconds: float = 180) -> None:
    """Wait until a run has logged a step."""
    until(
        lambda: any(line["step"] >= step for line in metrics(run_dir)),
        f"step {step}",
        seconds,
        lambda: log(run_dir),
        every=0.02,
    )


def pause(run_dir: Path) -> list[int]:
    """Stop the clock of a run's ranks, which gives a test time; return their processes."""
    paused = rank_processes(run_dir)
    for pid in paused:
        os.kill(pid, signal.SIGSTOP)
    return paused


def resume(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def wait_for_signal(paused: Sequence[int], number: signal.Signals, seconds: float = 60) -> None:
    """Wait until each of the paused processes was sent a signal."""
    until(lambda: all(_has_pending(pid, number) for pid in paused), f"{number.name}", seconds)


def _has_pending(pid: int, number: signal.Signals) -> bool:
    """Return whether a paused process was sent a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line[:6] in ("SigPnd", "ShdPnd")]
    return any(mask >> (number - 1) & 1 for mask in masks)
