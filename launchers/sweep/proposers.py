"""Who says which points there are: the grid itself, a search by Optuna, or W&B."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardwright.launchers.sweep import grid, objectives, study, wandb_agent, wandb_definition
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.directory import Point, Sweep
from shardwright.launchers.sweep.grid import Groups
from shardwright.launchers.sweep.places import Grid, Proposer
from shardwright.launchers.sweep.search import Search
from shardwright.launchers.sweep.space import Choices, Space, overrides, probes, space
from shardwright.train.config import RunConfig
from shardwright.train.config.tracking import WandbTracking, wandb_project
from shardwright.train.errors import UserError
from shardwright.train.units import counted

PROGRAM = (sys.executable, "-m", "shardwright")


def space_of(config: SweepConfig, groups: Groups) -> Space | None:
    """Return what is searched; None where all points are settled from the start.

    Raises UserError where that cannot be done, or what it needs is not installed.
    """
    if config.search.kind == "none" and config.backend != "wandb":
        return None
    found = space(config.grid, groups)
    if config.backend == "wandb":
        problems = wandb_definition.problems(config, found)
        if not found:
            problems.append(
                "sweep.backend=wandb has nothing to vary: give a setting several values"
            )
    else:
        problems = study.problems(config, found)
    if problems:
        raise UserError("\n".join(problems))
    if config.backend != "wandb":
        study.check_installed(config.search.kind)
    return found


def proposer(sweep: Sweep, found: Space | None, example: RunConfig | None) -> Proposer:
    """Return who proposes the points of a sweep, for the owner of its directory.

    ``example`` is the config of a point, by which W&B's project is known. Raises UserError where
    W&B cannot be reached.
    """
    if found is None:
        return Grid()
    if sweep.definition.backend == "wandb":
        return _at_wandb(sweep, found, example)
    return Search(sweep, found, grid.excluded(sweep.definition, list(found)))


def _at_wandb(sweep: Sweep, found: Space, example: RunConfig | None) -> Proposer:
    wanted = wandb_definition.definition(sweep.definition, found, sweep.arguments, PROGRAM)
    path = wandb_agent.written(sweep.directory, wanted)
    project = entity = None
    if example is not None and isinstance(example.tracking, WandbTracking):
        project, entity = wandb_project(example.tracking, os.environ), example.tracking.entity
    wandb_agent.check_reachable(path, project, entity)
    # What W&B's agent writes for its trials; otherwise it is where the command was typed.
    os.environ.setdefault("WANDB_DIR", str(sweep.directory))
    import wandb

    at_wandb = wandb_agent.registered(sweep.directory, wanted, wandb, project, entity)
    return wandb_agent.Agent(sweep.directory, found, at_wandb, wandb)


def examples(found: Space | None) -> list[Point]:
    """Return points at the ends of what is searched, to be composed and checked before any runs.

    Their numbers are those of no point.
    """
    return [
        Point(-1 - number, values, overrides(found, values))
        for number, values in enumerate(probes(found or {}))
        if found is not None
    ]


def check_examples(
    found: Sequence[Point], given: Callable[[Point], RunConfig], config: SweepConfig
) -> list[RunConfig]:
    """Return the configs of examples. Raises UserError with what is wrong with some, said once."""
    configs, problems = [], dict[str, list[Point]]()
    for point in found:
        try:
            configs.append(given(point))
            objectives.check(config.objectives, configs[-1:])
        except UserError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(point)
    if problems:
        raise UserError(
            "\n".join(
                line if len(points) == len(found) else f"{line} (as in {points[0].label})"
                for line, points in problems.items()
            )
        )
    return configs


def described(config: SweepConfig, found: Space) -> str:
    """Return what a search goes through, in lines. Pure."""
    search = config.search
    most = min((n for n in (search.trials, config.limit) if n is not None), default=None)
    count = f", {counted(most, 'point')}" if most is not None else ""
    pruned = f", pruned by {search.pruner}" if search.pruner != "none" else ""
    aims = ", ".join(f"{each.direction} {each.metric}" for each in config.objectives)
    by = (
        f"by W&B ({wandb_definition.METHODS[search.kind]})"
        if config.backend == "wandb"
        else (f"by Optuna ({search.kind})")
    )
    return "\n".join(
        [f"search {by}{count}{pruned}: {aims}", *(f"  {k}: {_said(k, found)}" for k in found)]
    )


def _said(key: str, found: Mapping[str, Any]) -> str:
    each = found[key]
    if isinstance(each, Choices):
        return ", ".join(each.words)
    kind = "whole numbers " if each.is_integer else ""
    step = f" in steps of {each.step:g}" if each.step not in (None, 1) else ""
    return f"{kind}from {each.low:g} to {each.high:g}{step}" + (", log" if each.is_log else "")
