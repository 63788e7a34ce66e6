"""Start composed runs, here one after the other or by a queue, once all of them can be."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from shardwright.launchers import launch, messages, preflight
from shardwright.launchers.composition.compose import Job, quoted, resolved
from shardwright.launchers.composition.settled import Settled, settled
from shardwright.launchers.kinds.launcher import Queue
from shardwright.launchers.machine import directories
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan.hardware import Hardware
from shardwright.launchers.registry import launcher_of
from shardwright.train import program
from shardwright.train.config import RunConfig
from shardwright.train.errors import BAD_INPUT, RESUMABLE, UserError


@dataclass(frozen=True)
class Runs:
    """Composed runs with nothing left open."""

    plans: Sequence[Settled]
    configs: Sequence[RunConfig]

    @classmethod
    def of(cls, jobs: Sequence[Job], here: Machine, known: Hardware | None = None) -> Runs:
        """Return what jobs come to here, with the plan's choice in place of each `auto`.

        ``known`` is the hardware that a plan supposes; None is this machine's. Raises UserError.
        """
        plans = [settled(job, here, known) for job in jobs]
        stamp = time.strftime("%Y%m%d-%H%M%S")
        configs = [resolved(plan.job, here, stamp) for plan in plans]
        _queue_of(configs)
        return cls(plans, configs)

    @classmethod
    def of_configs(cls, configs: Sequence[RunConfig]) -> Runs:
        """Return runs of configs with nothing left open; their directories keep their names."""
        named = DictConfig({"run_dir": "given"})
        return cls([Settled(Job(named, {}, None)) for _ in configs], configs)

    @property
    def reasons(self) -> list[str]:
        """Lines that say what the plan has chosen and why."""
        return [line for plan in self.plans for line in plan.reason]

    @property
    def are_of_a_multirun(self) -> bool:
        """Whether they were asked for by -m."""
        return any(plan.job.number is not None for plan in self.plans)


def start(runs: Runs, here: Machine, *, created: Callable[[Path], object] | None = None) -> int:
    """Run all, or hand them to their queue; return the first bad exit code. Raises UserError.

    ``created`` is told of each directory. A queue gets the names that there are, where it is given.
    """
    jobs, configs = [each.job for each in runs.plans], runs.configs
    queue = _queue_of(configs)
    is_generated = all(job.is_named_here for job in jobs) and not (queue and created)
    with contextlib.ExitStack() as stack:
        if is_generated and runs.are_of_a_multirun:
            configs = stack.enter_context(directories.claimed_sweep(configs))
            is_generated = False  # the runs in it are nobody else's
        if queue is not None:
            choices, chosen = [job.choices for job in jobs], [each.choice for each in runs.plans]
            return queue.new_runs(configs, choices, here, is_generated=is_generated, chosen=chosen)
        return _one_after_the_other(
            runs.plans, configs, here, is_generated=is_generated, created=created
        )


def check(configs: Sequence[RunConfig], here: Machine) -> None:
    """Raise UserError where one of several runs cannot be; what holds for many is said once."""
    problems: dict[str, None] = {}
    for config in configs:
        try:
            preflight.check(config, here)
        except UserError as error:
            problems[str(error)] = None
    if problems:
        raise UserError("\n".join(problems))


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


def _one_after_the_other(
    plans: Sequence[Settled],
    configs: Sequence[RunConfig],
    here: Machine,
    *,
    is_generated: bool,
    created: Callable[[Path], object] | None,
) -> int:
    """Run all, whatever comes of each, until one is told to stop; return the first bad code."""
    worst, jobs = 0, [each.job for each in plans]
    for number, (plan, config) in enumerate(zip(plans, configs, strict=True), 1):
        is_stopped = True
        try:
            code = launch.new_run(
                config,
                plan.job.choices,
                here,
                is_generated=is_generated,
                chosen=plan.choice,
                created=created,
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
