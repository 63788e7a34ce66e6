"""`shardwright train`: compose runs, check them, and start them here or hand them to SLURM."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence

from shardwright.launchers import launch, messages, preflight
from shardwright.launchers.commands import measured
from shardwright.launchers.commands.dry_run import show
from shardwright.launchers.composition.compose import (
    Job,
    command_line,
    compose,
    config_dir,
    quoted,
    resolved,
)
from shardwright.launchers.composition.settled import Settled, settled
from shardwright.launchers.kinds.launcher import Queue
from shardwright.launchers.machine import directories
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan import hardware
from shardwright.launchers.plan.hardware import Hardware
from shardwright.launchers.registry import launcher_of
from shardwright.train import program
from shardwright.train.config import RunConfig
from shardwright.train.errors import BAD_INPUT, RESUMABLE, UserError

SWEEP_EXISTS = (
    "note: -m runs one after the other and cannot be continued as a whole; `shardwright sweep` "
    "with the same words runs several at a time, and resumes"
)


def main(arguments: Sequence[str]) -> int:
    """Start what the arguments ask for, or with --dry-run show it; return the exit code."""
    dry_run = "--dry-run" in arguments
    said, others = hardware.split([a for a in arguments if a != "--dry-run"])
    jobs = compose(others)
    here = machine.detect(os.environ)
    known = measured.chosen(said, config_dir(others), here)
    plans = _settled(jobs, here, known, as_comment=dry_run)
    jobs, chosen = [each.job for each in plans], [each.choice for each in plans]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    configs = [resolved(job, here, stamp) for job in jobs]
    queue = _queue_of(configs)
    if any(job.number is not None for job in jobs):
        print(SWEEP_EXISTS, file=sys.stderr)
    if dry_run:
        show(configs, here)
    _check(configs, here)
    if dry_run:
        return 0
    is_generated = all(job.is_named_here for job in jobs)
    with contextlib.ExitStack() as stack:
        if is_generated and any(job.number is not None for job in jobs):
            configs = stack.enter_context(directories.claimed_sweep(configs))
            is_generated = False  # the runs in it are nobody else's
        if queue is not None:
            choices = [job.choices for job in jobs]
            return queue.new_runs(configs, choices, here, is_generated=is_generated, chosen=chosen)
        return _one_after_the_other(plans, configs, here, is_generated=is_generated)


def _settled(
    jobs: Sequence[Job], here: Machine, said: Hardware | None, *, as_comment: bool
) -> list[Settled]:
    """Return runs with the plan's choice in place of each `auto`; say what was chosen and why."""
    found = [settled(job, here, said) for job in jobs]
    for each in found:
        for line in each.reason:
            print(f"# {line}" if as_comment else line)
    return found


def _queue_of(configs: Sequence[RunConfig]) -> Queue | None:
    """Return what takes runs instead of this command; None where they start here.

    Raises UserError where not all of them have the same.
    """
    queues = {config.launcher.kind: launcher_of(config).queue for config in configs}
    found = [queue for queue in queues.values() if queue is not None]
    if found and len(queues) > 1:
        raise UserError(
            f"launcher={','.join(sorted(queues))}: the runs of a sweep start here or by "
            f"{found[0].NAME}, not both; choose one launcher"
        )
    return found[0] if found else None


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright train`: Hydra's flags and ours."""
    found = command_line()
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="show config, engine settings and command, and start nothing",
    )
    return found


def _check(configs: Sequence[RunConfig], here: Machine) -> None:
    """Raise UserError where one of several runs cannot be; what holds for many is said once."""
    problems: dict[str, None] = {}
    for config in configs:
        try:
            preflight.check(config, here)
        except UserError as error:
            problems[str(error)] = None
    if problems:
        raise UserError("\n".join(problems))


def _one_after_the_other(
    plans: Sequence[Settled], configs: Sequence[RunConfig], here: Machine, *, is_generated: bool
) -> int:
    """Run all, whatever comes of each, until one is told to stop; return the first bad code."""
    worst, jobs = 0, [each.job for each in plans]
    for number, (plan, config) in enumerate(zip(plans, configs, strict=True), 1):
        is_stopped = True
        try:
            code = launch.new_run(
                config, plan.job.choices, here, is_generated=is_generated, chosen=plan.choice
            )
            is_stopped = code == RESUMABLE or code > 128
        except UserError as error:
            if len(configs) == 1:
                raise
            print(messages.error_text(str(error)), file=sys.stderr)
            code, is_stopped = BAD_INPUT, False
        finally:
            if is_stopped and number < len(configs):
                print(not_started(jobs[number:], configs[number:]), file=sys.stderr)
        if is_stopped:
            return code
        worst = worst or code
    return worst


def not_started(jobs: Sequence[Job], configs: Sequence[RunConfig]) -> str:
    """Return which runs of a sweep are left, and the command that starts each. Pure."""
    commands = [
        program.command("train", *job.arguments, f"run_dir={quoted(str(config.run_dir))}")
        for job, config in zip(jobs, configs, strict=True)
    ]
    return "\n".join(
        [
            f"\n{len(commands)} run(s) of the sweep were not started; start them with",
            *(f"  {command}" for command in commands),
        ]
    )
