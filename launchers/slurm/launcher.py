"""launcher=slurm: SLURM takes the run, and starts its ranks as a job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from shardwright.launchers.kinds.launcher import Launcher, Queue, Task
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.slurm import script, submit
from shardwright.launchers.slurm.environment import job_environment
from shardwright.train.config import SlurmLauncher
from shardwright.train.program import PACKAGES


class Slurm(Launcher[SlurmLauncher]):
    """A job of a cluster."""

    queue: ClassVar[Queue | None] = submit

    def command(self, task: Task, python: str, node_rank: int, machine: Machine) -> list[str]:
        """Return the argv of srun, which waits for all ranks; a run's are started by its job."""
        rank = super().command(task, python, node_rank, machine)
        return script.waited_command(self.config, rank, submit.site_of(self.config))

    def environment(
        self, machine: Machine, user: Mapping[str, str], *, packages: Path = PACKAGES
    ) -> dict[str, str]:
        """Return the variables of a job: this machine, a login node, says nothing of its nodes."""
        return job_environment(self.config, user, packages=packages)

    def problems(self) -> Iterator[str]:
        run_dir, site = str(self.config.run_dir), self.section.site
        if "%" in run_dir or "\\" in run_dir:
            yield (
                f"run_dir={run_dir} holds % or a backslash, which SLURM replaces in the path of a "
                "job's log; choose another"
            )
        if site is not None and not os.access(site, os.R_OK):
            yield (
                f"launcher.site={site} cannot be read; copy slurm/site.example.sh there, or "
                "leave it out"
            )
