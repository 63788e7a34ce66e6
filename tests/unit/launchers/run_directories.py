"""Run directories as they stand at some moment."""

from __future__ import annotations

from pathlib import Path

from tests.unit.launchers.configs import slurm_run
from train.config import to_yaml


def a_run(directory: Path) -> Path:
    (directory / "logs").mkdir(parents=True)
    (directory / "config.yaml").write_text(to_yaml(slurm_run(str(directory))))
    return directory
