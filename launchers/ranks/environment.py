"""The environment of a run's ranks: a pure function of its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.registry import launcher_of
from shardwright.train.config import RunConfig
from shardwright.train.program import PACKAGES


def rank_environment(
    config: RunConfig, machine: Machine, user: Mapping[str, str], *, packages: Path = PACKAGES
) -> dict[str, str]:
    """Return the variables to add to the user's environment; none that the user has set."""
    return launcher_of(config).environment(machine, user, packages=packages)
