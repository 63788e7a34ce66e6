"""From what composes a benchmark's run to the directory that its ranks read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from shardwright.launchers import preflight
from shardwright.launchers.composition.compose import compose
from shardwright.launchers.machine import directories
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import RunConfig, from_tree


def freeze(overrides: Sequence[str], here: Machine, run_dir: Path) -> RunConfig:
    """Compose a run and create its directory, as `shardwright train` does.

    Raises UserError where this machine cannot run it.
    """
    (job,) = compose(list(overrides))
    tree = OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True)
    config = machine.resolve(from_tree(tree), here, str(run_dir))
    preflight.check(config, here)
    directories.create(config, run_dir)
    return config
