"""Run directories as they stand at some moment."""

from __future__ import annotations

from pathlib import Path

from shardwright.train.config import to_yaml
from tests.unit.launchers.configs import slurm_run


def a_run(directory: Path) -> Path:
    (directory / "logs").mkdir(parents=True)
    (directory / "config.yaml").write_text(to_yaml(slurm_run(str(directory))))
    return directory
