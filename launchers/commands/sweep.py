"""`shardwright sweep`: plan many runs, start them where there is room, continue what was cut."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardwright.launchers import messages
from shardwright.launchers.composition.compose import group_options
from shardwright.launchers.machine import directories, names
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.sweep import (
    choice,
    decisions,
    directory,
    grid,
    objectives,
    planning,
    proposers,
    request,
    wandb_definition,
)
from shardwright.launchers.sweep.choice import Where
from shardwright.launchers.sweep.conduct import Conductor
from shardwright.launchers.sweep.directory import Point, PointState, Sweep
from shardwright.launchers.sweep.places import Display, Task
from shardwright.launchers.sweep.planning import Composer
from shardwright.launchers.sweep.request import Request
from shardwright.launchers.sweep.space import Space
from shardwright.launchers.sweep.table import Table
from shardwright.train import program
from shardwright.train.config import RunConfig
from shardwright.train.console import terminal
from shardwright.train.errors import BAD_INPUT

parser = request.parser
"""The command line of `shardwright sweep`."""


def main(arguments: Sequence[str]) -> int:
    """Run a sweep, or with --dry-run show it; return the exit code."""
    if not arguments:
        parser().print_usage(sys.stderr)
        return BAD_INPUT
    groups = group_options()
    asked = request.of(arguments, groups)
    searched = proposers.space_of(asked.config, groups)
    if asked.config.backend == "wandb":
        words = tuple(wandb_definition.tracked(asked.arguments))
        asked = dataclasses.replace(asked, arguments=words)
    wanted: list[Point] = []
    if searched is None:
        wanted = grid.points(asked.config, grid.axes(asked.config, groups))
    is_search = searched is not None
    sweep = planning.plan_of(asked, wanted, is_search=is_search)
    here = machine.detect(os.environ)
    if sweep.working_directory is not None and Path(sweep.working_directory).is_dir():
        os.chdir(sweep.working_directory)
    if asked.dry_run:
        return _show(sweep, asked, here, searched)
    terminal.outlive()
    with _owned(sweep) as (sweep, is_new):
        if not is_new:  # its last owner may have added points until just now
            asked = dataclasses.replace(asked, sweep_dir=sweep.directory)
            sweep = planning.plan_of(asked, wanted, is_search=is_search)
        return _run(sweep, asked, here, Table(), searched)


@contextlib.contextmanager
def _owned(sweep: Sweep) -> Iterator[tuple[Sweep, bool]]:
    """Own a sweep's directory, made if need be; yield it, and whether it was made.

    What was made is removed again where no plan came of it.
    """
    is_new = not directory.is_sweep(sweep.directory)
    made: list[Path] = []
    while True:
        try:
            directories.make_parents(sweep.directory, made)
            sweep.directory.mkdir()
            made.append(sweep.directory)
        except FileExistsError:
            if is_new and any(sweep.directory.iterdir()):  # another sweep's, of the same second
                following = names.free(names.following(sweep.directory))
                sweep = dataclasses.replace(sweep, directory=following)
                continue
        except OSError as error:
            raise directories.cannot_be_made(f"sweep_dir={sweep.directory}", error) from None
        break
    try:
        with directory.claimed(sweep.directory):
            yield sweep, is_new
    finally:
        if is_new and not directory.is_sweep(sweep.directory):
            (sweep.directory / directory.LOCK).unlink(missing_ok=True)
            directories.remove_empty(made)


def _prepared(
    sweep: Sweep, asked: Request, here: Machine, searched: Space | None
) -> tuple[list[Point], Where, Composer, RunConfig]:
    """Return the points to start, composed and checked, where they run, and one as an example.

    Raises UserError with what is wrong, before anything starts.
    """
    numbers = decisions.to_start(
        directory.states(sweep), sweep.definition.max_retries, retries_all=asked.retry_failed
    )
    points = [sweep.points[number] for number in numbers]
    composer = Composer(sweep, here, stamp=time.strftime("%Y%m%d-%H%M%S"))
    planning.check(points, composer.given)
    examples = proposers.examples(searched)
    configs = [composer.given(point) for point in points or sweep.points[:1]]
    configs += proposers.check_examples(examples, composer.given, sweep.definition)
    objectives.check(sweep.objectives, configs)
    choice.check_launchers(configs, sweep.definition.backend)
    where = choice.where(sweep, configs, here)
    composer.words, composer.here = where.words, where.machine
    planning.check(points, composer.task)
    proposers.check_examples(examples, lambda p: composer.task(p).config, sweep.definition)
    return points, where, composer, configs[0]


def _show(sweep: Sweep, asked: Request, here: Machine, searched: Space | None) -> int:
    points, where, composer, _ = _prepared(sweep, asked, here, searched)
    states = directory.states(sweep)
    rows = list(zip(sweep.points, states, strict=True))
    has_values = any(state.values for state in states)
    if rows:
        width = messages.terminal_width()
        print(decisions.table(sweep, rows, width, with_values=has_values, most=len(rows)))
    if searched is not None:
        print(proposers.described(sweep.definition, searched))
    print(f"\n{sweep.directory}: {decisions.counts(states)}; runs {where.described}")
    tasks = [composer.task(point) for point in points]
    if where.shown is not None:
        print(where.shown(tasks))
    else:
        print("\n".join(_commands(tasks, composer.words)))
    return 0


def _commands(tasks: Sequence[Task], words: Sequence[str]) -> list[str]:
    """Return what would be started: each resume, and of new runs the first. Pure."""
    resumed = [task for task in tasks if task.is_resumed]
    fresh = [task for task in tasks if not task.is_resumed]
    lines = [program.command(*task.command(*words)) for task in resumed]
    if fresh:
        which = f", the first of {len(fresh)} new ones" if len(fresh) > 1 else ""
        lines.append(f"\n# point {fresh[0].point.number}{which}")
        lines.append(program.command(*fresh[0].command(*words)))
    return lines


def _run(
    sweep: Sweep, asked: Request, here: Machine, display: Display, searched: Space | None
) -> int:
    points, where, composer, example = _prepared(sweep, asked, here, searched)
    directory.write_plan(sweep)
    proposer = proposers.proposer(sweep, searched, example)
    if not points and proposer.is_finished():
        display.say("nothing is left to run; to run it all anew, give another sweep_dir")
        return _told(sweep, directory.states(sweep))
    place = where.opened(display)
    rows = {
        "points": f"{len(sweep.points)}: {decisions.counts(directory.states(sweep))}",
        "runs": place.described(),
        "log": f"{sweep.directory}/{directory.POINTS}/N.log, and that of each run",
        "stop": place.how_to_stop(),
    }
    display.say(f"sweep {sweep.directory}")
    display.say("\n".join(f"  {name:<10}{text}" for name, text in rows.items()))
    if searched is not None:
        display.say(proposers.described(sweep.definition, searched))
    conductor = Conductor(sweep, place, proposer, display, composer.task)
    code = conductor.run(retries_all=asked.retry_failed)
    _told(conductor.sweep, conductor.states)
    return code


def _told(sweep: Sweep, states: Sequence[PointState]) -> int:
    """Say what has come of a sweep, and what to do next; return what its states come to."""
    print(f"\n{decisions.summary(sweep, states, messages.terminal_width())}")
    for text in (
        decisions.best_command(sweep, states),
        decisions.how_to_continue(sweep, states, sweep.definition.max_retries),
    ):
        if text is not None:
            print(text)
    sys.stdout.flush()
    return decisions.exit_code(states, was_stopped=False)
