"""A run that has ended, as a resume finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardwright.train.config import RunConfig, from_tree, to_yaml
from tests.checkpoints import write_checkpoint
from tests.unit.trees import TREE


def run(**sections: Any) -> RunConfig:
    return from_tree({**TREE, **sections})


def make_ended_run(tmp_path: Path) -> Path:
    """Return a run that has ended after 60 steps of 64 samples, or so it looks."""
    directory = tmp_path / "run"
    (directory / "logs").mkdir(parents=True)
    (directory / "config.yaml").write_text(to_yaml(finished(directory)))
    training = {"documents": 9, "tokens": 80_000, "samples_per_epoch": 1_250}
    (directory / "data.json").write_text(json.dumps({"tokens": "x", "training": training}))
    checkpoint(directory, 60)
    return directory


def finished(directory: Path, **trainer: Any) -> RunConfig:
    length = trainer or {"max_steps": 60}
    return run(
        run_dir=str(directory),
        launcher={"kind": "local", "device": "cpu"},
        strategy={"kind": "single"},
        trainer={"global_batch_size": 64, "micro_batch_size": 4, **length},
    )


def checkpoint(directory: Path, step: int) -> Path:
    return write_checkpoint(
        directory / "checkpoints",
        step,
        samples=64 * step,
        tokens=64 * 64 * step,
        batch_size=64,
        schedule={"samples": 64 * step, "samples_per_step": 64},
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file of a run, that which says who owns it left out."""
    found = (path for path in directory.rglob("*") if path.is_file() and path.name != "owner.json")
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}
