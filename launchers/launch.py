"""Launch a run on this machine: prepare its data, run its ranks, report the outcome."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from shardwright.launchers import messages
from shardwright.launchers.machine import directories
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks import child
from shardwright.launchers.ranks.command import prepare_command, rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.train.config import RunConfig
from shardwright.train.console import progress, terminal
from shardwright.train.durable import write_text
from shardwright.train.errors import BAD_INPUT, FAILED, RESUMABLE
from shardwright.train.process import signals
from shardwright.train.program import package_environment
from shardwright.train.run_directory import owner, pruned, stop_note, stopped_preparing
from shardwright.train.run_directory.choice import Choice
from shardwright.train.run_directory.failures import rank_failures
from shardwright.train.run_directory.names import LOGS, RUN_LOG, TORCHRUN_LOG, torchrun_log
from shardwright.train.run_directory.owner import Claim
from shardwright.train.units import counted


def new_run(
    config: RunConfig,
    choices: Mapping[str, str],
    here: Machine,
    *,
    is_generated: bool = False,
    chosen: Choice | None = None,
    created: Callable[[Path], object] | None = None,
) -> int:
    """Create the run directory, prepare the data, run the ranks; return the exit code.

    A directory's name that ``is_generated`` is another one where that is taken, and ``created`` is
    told which it is. ``chosen`` is what a plan has chosen for the run.
    """
    assert config.run_dir is not None, "resolved"

    terminal.outlive()
    with contextlib.ExitStack() as stack:
        claims: list[Claim] = []
        config, made = directories.create_named(
            config,
            is_generated=is_generated,
            claim=lambda run_dir: claims.append(stack.enter_context(claimed(run_dir))),
            chosen=chosen,
        )
        run_dir = Path(str(config.run_dir))
        if created is not None:
            created(run_dir)
        environment = rank_environment(config, here, os.environ)
        (claim,) = claims
        try:
            stack.enter_context(terminal.kept_in(run_log(run_dir)))
            print(
                messages.header(config, choices, here, environment, messages.terminal_width()),
                flush=True,
            )
            print(messages.ignored(os.environ, messages.terminal_width()), end="", flush=True)
            prepared = prepare(config, claim)
        except BaseException:
            stack.close()  # an open file would keep its directory on NFS
            directories.take_back(made)
            raise
        if prepared == BAD_INPUT:
            stack.close()
            directories.take_back(made)
        if prepared != 0:
            return prepared
        print(launcher_of(config).other_nodes(), end="", flush=True)
        return run_ranks(config, here, claim)


def claimed(run_dir: Path) -> contextlib.AbstractContextManager[Claim]:
    """Own a run directory, of which this process prepares the data and starts the ranks."""
    return owner.owned(run_dir, lambda text: print(text, flush=True), doing=owner.PREPARING)


def run_log(run_dir: Path) -> Path:
    """Return where what the terminal of a run shows is kept."""
    return run_dir / LOGS / RUN_LOG


def prepare(config: RunConfig, claim: Claim | None) -> int:
    """Make the tokenizer and tokens of a run directory where they are not yet there.

    ``claim`` is None where another node's launcher owns the run. Returns the exit code, and has
    said what went wrong where it is not 0.
    """
    run_dir = Path(str(config.run_dir))
    if claim is not None:
        stop_note.forget(run_dir)
    ended = child.run(
        # Of several nodes only the first appends to the log that they share.
        prepare_command(run_dir, log=run_log(run_dir) if claim is not None else None),
        {**package_environment(os.environ), **owner.inherited(claim)},
        grace_seconds=config.launcher.grace_seconds,
        run_dir=run_dir if claim is not None else None,
        at_ctrl_c="stopping the preparation of the data",
    )
    if ended.stopped_by is not None or ended.code == RESUMABLE:
        if claim is not None and ended.stopped_by is not None:
            # The work may have ended before it could be told who asks, or without being told.
            stopped_preparing.note(run_dir, child.asked_by(ended.stopped_by))
        print(messages.stopped_early(run_dir, ended.stopped_by), file=sys.stderr)
        return RESUMABLE
    if ended.code in (0, BAD_INPUT):
        return ended.code
    print(messages.preparation_failed(run_dir, ended.code), file=sys.stderr)
    return FAILED


def run_ranks(config: RunConfig, here: Machine, claim: Claim | None, node_rank: int = 0) -> int:
    """Start this node's ranks of a run directory and wait; return the exit code.

    ``claim`` is None where another node's launcher owns the run.
    """
    run_dir = Path(str(config.run_dir))
    # Launchers write their own pages about a failed rank to stderr, the ranks the terminal's lines
    # to stdout.
    log = TORCHRUN_LOG
    if node_rank != 0:  # the nodes share the directory, and all that join may have one rank
        log = torchrun_log(socket.gethostname())
    quiet = run_dir / LOGS / log if launcher_of(config).has_pages else None
    try:
        argv, environment = _made_ready(config, here, claim, node_rank)
    except KeyboardInterrupt:
        if claim is None:
            raise
        stopped_preparing.note(run_dir, signals.CTRL_C)
        print(messages.stopped_early(run_dir, signal.SIGINT), file=sys.stderr)
        return RESUMABLE
    ended = child.run(
        argv,
        environment,
        stderr_file=quiet,
        grace_seconds=config.launcher.grace_seconds,
        run_dir=run_dir,
        is_elsewhere=config.launcher.is_elsewhere,
    )
    if where := stop_note.read(run_dir):
        print(messages.stopped(where, run_dir, ended.stopped_by), file=sys.stderr)
        return RESUMABLE
    if ended.code == 0:
        print(messages.finish(run_dir))
        return 0
    failures = rank_failures(run_dir)
    why = messages.failure(ended.code, failures, run_dir, ended.stopped_by, log, config=config)
    print(why, file=sys.stderr)
    return messages.exit_code(ended.code, failures, ended.stopped_by)


def _made_ready(
    config: RunConfig, here: Machine, claim: Claim | None, node_rank: int
) -> tuple[list[str], dict[str, str]]:
    """Write what ranks are started with, and let the first own the run; return how to start them.

    Nothing of what an earlier start has left says any more where the run has stopped.
    """
    run_dir = Path(str(config.run_dir))
    environment = {
        **rank_environment(config, here, os.environ),
        **owner.inherited(claim),
        progress.BEGAN: str(time.time()),
    }
    for name, text in launcher_of(config).files(environment, here).items():
        write_text(run_dir / name, text)
    if claim is not None:
        stop_note.forget(run_dir)
        pruned.forget(run_dir)
        claim.hand_on()
    here_ranks = config.launcher.ranks_per_node
    print(f"starting {counted(here_ranks, 'rank')}", flush=True)
    argv = rank_command(config, run_dir, machine=here, node_rank=node_rank)
    return argv, environment
