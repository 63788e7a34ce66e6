"""Run directories as they stand at some moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.config import to_yaml
from tests.unit.launchers.configs import config, slurm_run


def a_run(directory: Path) -> Path:
    (directory / "logs").mkdir(parents=True)
    (directory / "config.yaml").write_text(to_yaml(slurm_run(str(directory))))
    return directory


def a_trained_run(
    directory: Path, losses: Sequence[float], *, is_done: bool = True, **sections: Any
) -> Path:
    """Fabricate a run that has logged a loss at each step and held out half of it at every other.

    ``sections`` are changes of the config, as `config` takes them.
    """
    (directory / "logs").mkdir(parents=True)
    steps = {"max_steps": len(losses), **sections.pop("trainer", {})}
    run = resolve(config(trainer=steps, **sections), Machine(), str(directory))
    (directory / "config.yaml").write_text(to_yaml(run))
    lines: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, 1):
        at = {"step": step, "samples": step * 8, "tokens": step * 512, "time": 1e9 + step}
        lines.append({**at, "loss": loss, "tokens_per_second": 500.0 + step})
        lines += [{**at, "eval_loss": loss / 2}] if step % 2 == 0 else []
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {
        "started": "2026-01-01T00:00:00Z",
        "argv": ["python"],
        "commit": "c0ffee",
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
        "world_size": 1,
        "parameters": 4096,
        "hardware": {"host": "node1", "gpus": []},
    }
    (directory / "provenance.json").write_text(json.dumps(facts))
    tokens = {"tokens": "0f08", "training": {"samples": 9, "samples_per_epoch": 9}}
    (directory / "data.json").write_text(json.dumps(tokens))
    if is_done:
        (directory / "final").mkdir()
    return directory
