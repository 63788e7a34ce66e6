"""The variables that a job's script sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardwright.launchers.kinds import launcher, torchrun
from shardwright.train.config import RunConfig, SlurmLauncher
from shardwright.train.program import PACKAGES, package_environment


def job_environment(
    config: RunConfig,
    user: Mapping[str, str],
    *,
    packages: Path = PACKAGES,
    cache: Path = launcher.NODE_CACHE,
) -> dict[str, str]:
    """Return the variables that a job's script sets; sbatch carries the user's own to the nodes."""
    section = config.launcher
    assert isinstance(section, SlurmLauncher)
    wanted = {
        **package_environment(user, packages=packages),
        **launcher.OF_PYTHON,
        **launcher.of_the_allocator(section, user),
    }
    if section.device == "cpu":
        wanted["DS_ACCELERATOR"] = "cpu"
    if section.nodes > 1:
        wanted |= launcher.caches(cache)
    if section.starts == "torchrun":
        wanted |= torchrun.patience(section.grace_seconds)
    return launcher.not_set_by(user, wanted)
