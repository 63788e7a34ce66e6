"""Run and sweep directories as trainings leave them, for what reads many of them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shardwright.launchers.sweep import definition, directory
from shardwright.launchers.sweep.directory import Point, PointState, Sweep

BEGUN = 1_790_000_000.0


def logged(
    steps: int, *, level: float = 3.0, seed: int = 0, every: int = 50, sets: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's metrics."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        at = {"step": step, "samples": step * 8, "tokens": step * 8192, "time": BEGUN + step * 0.5}
        loss = level + 4 * math.exp(-3 * step / max(steps, 100))
        yield at | {
            "loss": loss + draw.gauss(0, 0.05),
            "grad_norm": 1.0 + draw.random(),
            "learning_rate": 3e-4 * min(1.0, step / 20) * (1 - step / (steps + 1)),
            "tokens_per_second": 16_000 + draw.gauss(0, 400),
            "mfu": 0.4 + draw.gauss(0, 0.01),
            "peak_memory_bytes": 3 * 2**30,
        }
        if step % every == 0:
            yield (
                at
                | {"eval_loss": loss + 0.1}
                | {f"eval_loss/{name}": loss + 0.1 * number for number, name in enumerate(sets)}
            )


def make_run(
    run_dir: Path, tree: Mapping[str, Any], lines: Iterator[dict[str, Any]] | None = None
) -> Path:
    """Write what a run of this config leaves that has logged these lines."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(dict(tree)))
    if lines is not None:
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (run_dir / "metrics.jsonl").write_text(text)
    return run_dir


def resumed(run_dir: Path, step: int, *overrides: str) -> None:
    """Note that a run was resumed from a checkpoint."""
    (run_dir / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    entry = {"time": BEGUN, "checkpoint": f"checkpoint-{step}", "overrides": list(overrides)}
    with (run_dir / "history.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def make_sweep(
    sweep_dir: Path,
    points: Sequence[Mapping[str, Any]],
    states: Sequence[Mapping[str, Any]],
    *,
    objectives: Sequence[Mapping[str, str]] = ({"metric": "eval_loss", "direction": "minimize"},),
    arguments: Sequence[str] = ("model=gpt2_tiny",),
) -> Sweep:
    """Write the plan of a sweep and what it has noted of its points, without their runs."""
    config = definition.from_tree({"name": sweep_dir.name, "objectives": list(objectives)})
    sweep = Sweep(
        sweep_dir,
        config.name,
        BEGUN,
        config,
        tuple(arguments),
        tuple(
            Point(number, settings, tuple(f"{k}={v}" for k, v in settings.items()))
            for number, settings in enumerate(points)
        ),
    )
    sweep_dir.mkdir(parents=True)
    directory.write_plan(sweep)
    for number, state in enumerate(states):
        directory.write_state(sweep_dir, PointState(number, **state))
    return sweep
