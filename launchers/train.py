"""`shardwright train`: compose runs, check them, and start them here or hand them to SLURM."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from launchers import launch, machine, preflight, submit
from launchers.compose import compose, resolved
from launchers.dry_run import show
from train.errors import RESUMABLE, UserError


def main(arguments: Sequence[str]) -> int:
    """Start what the arguments ask for, or with --dry-run show it; return the exit code."""
    dry_run = "--dry-run" in arguments
    jobs = compose([argument for argument in arguments if argument != "--dry-run"])
    here = machine.detect(os.environ)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    configs = [resolved(job, here, stamp) for job in jobs]
    if "slurm" in (kinds := {config.launcher.kind for config in configs}) and len(kinds) > 1:
        raise UserError(
            f"launcher={','.join(sorted(kinds))}: the runs of a sweep start here or by SLURM, "
            "not both; choose one launcher"
        )
    if dry_run:
        show(configs, here)
    for config in configs:
        preflight.check(config, here)
    if dry_run:
        return 0
    if "slurm" in kinds:
        return submit.new_runs(configs, [job.choices for job in jobs], here)
    worst = 0
    for job, config in zip(jobs, configs, strict=True):
        code = launch.new_run(config, job.choices, here)
        if code == RESUMABLE or code > 128:  # told to stop: the rest of a sweep does not start
            return code
        worst = worst or code
    return worst
