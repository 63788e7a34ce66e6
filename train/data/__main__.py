"""Prepare a run's tokenizer and tokens: `python -m shardwright.train.data RUN_DIR`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

from shardwright.train import config
from shardwright.train.config import NamedModel, RunConfig
from shardwright.train.console import progress, reports, terminal
from shardwright.train.data.prepare import prepare, prepare_part
from shardwright.train.data.tokens import cache
from shardwright.train.errors import BAD_INPUT, FAILED, RESUMABLE, UserError
from shardwright.train.model.user_modules import import_all
from shardwright.train.process import exhausted, signals
from shardwright.train.process.parent import end_with
from shardwright.train.process.stop_request import stop_with_standard_input, watch_for_stop
from shardwright.train.run_directory import owner, stop_request, stopped_preparing
from shardwright.train.run_directory.names import LOGS, PROGRESS, RUN_CONFIG


def main() -> int:
    """Prepare the data; return 0, 1 where that failed, 2 on bad input, 75 where it was stopped."""
    signals.install()
    terminal.outlive()
    parser = argparse.ArgumentParser(prog="python -m shardwright.train.data", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory that holds the run's config.yaml")
    parser.add_argument("--log", type=Path, help="a file to append to what is shown")
    parser.add_argument(
        "--part", type=_part, help="I/N: make every N-th shard of the corpus alone, from the I-th"
    )
    parser.add_argument(
        "--shared",
        type=Path,
        help="tell how far it is on standard output, and stop when standard input does, for a "
        "process on another node that has made this file in the cache",
    )
    options = parser.parse_args()
    with terminal.kept_in(options.log) if options.log else nullcontext():
        return _owned_and_prepared(options.run_dir, options.part, options.shared)


def _part(text: str) -> tuple[int, int]:
    number, of_all = map(int, text.split("/"))
    if not 0 <= number < of_all:
        raise ValueError(text)
    return number, of_all


def _owned_and_prepared(
    run_dir: Path, part: tuple[int, int] | None = None, shared: Path | None = None
) -> int:
    # In a job several nodes may do this, each for its own disk; the first one owns the run.
    is_first = int(os.environ.get("SLURM_PROCID", "0")) == 0
    is_mine = is_first and not owner.is_launched() and part is None
    try:
        if shared is not None:
            _check_shared(run_dir, shared)
        settings = config.load(run_dir)
        with owner.owned(run_dir, print, owner.PREPARING) if is_mine else nullcontext():
            watches = is_mine or owner.acts_for_the_owner()
            tells = shared is not None
            return _watched(run_dir, settings, watches=watches, part=part, tells=tells)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _check_shared(run_dir: Path, shared: Path) -> None:
    """Raise UserError where this node sees other directories than the one that has started this."""
    for name, directory, path in (
        ("run_dir", run_dir, run_dir / RUN_CONFIG),
        ("data.cache_dir", shared.parent, shared),
    ):
        if not path.is_file():
            raise UserError(
                f"{name}={directory} on {socket.gethostname()} is not that of the node where this "
                "was started; give a directory that all nodes of launcher.hostfile share"
            )


def _watched(
    run_dir: Path,
    settings: RunConfig,
    *,
    watches: bool,
    part: tuple[int, int] | None = None,
    tells: bool = False,
) -> int:
    """Have a process of its own do the work, which a signal ends wherever it is.

    Training a tokenizer takes minutes in compiled code, where no handler runs. Nothing is lost with
    it that could be kept: what is being built has a temporary name, and what has its own is whole.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    worker = os.fork()  # before this process has a second thread
    if worker == 0:
        os._exit(_work(run_dir, settings, parent, watches=watches, part=part, tells=tells))
    with (
        watch_for_stop(run_dir) if watches else nullcontext(),
        stop_with_standard_input() if tells else nullcontext(),
    ):
        try:
            with signals.at_once():
                os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # it stays its pid's until
        except signals.Stop:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            cache.remove_leftovers(cache.cache_root(settings.data), worker)
            if part is None and not tells:
                reason = stop_request.said(run_dir) or str(signals.asked())
                stopped_preparing.note(run_dir, reason)
            return RESUMABLE
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if code < 0:
        cache.remove_leftovers(cache.cache_root(settings.data), worker)
        memory = "; the kernel does this when memory runs out" if code == -signal.SIGKILL else ""
        print(
            f"preparing the data was killed by {signal.Signals(-code).name}{memory}",
            file=sys.stderr,
        )
    return code if code >= 0 else FAILED


def _work(
    run_dir: Path,
    settings: RunConfig,
    parent: int,
    *,
    watches: bool = False,
    part: tuple[int, int] | None = None,
    tells: bool = False,
) -> int:
    """Do the work in a process that ends with its parent; return its exit code."""
    for number in signals.HANDLED:  # a terminal sends its Ctrl-C to both
        signal.signal(number, signal.SIG_IGN)
    if not end_with(parent):
        return FAILED
    lines = reports.Lines() if tells else progress.LogLines(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[lines])
    logging.getLogger("shardwright.train").setLevel(logging.INFO)
    noted_in = run_dir / LOGS / PROGRESS if watches else None
    code = _prepared(run_dir, settings, noted_in, part, tells=tells)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _prepared(
    run_dir: Path,
    settings: RunConfig,
    noted_in: Path | None = None,
    part: tuple[int, int] | None = None,
    *,
    tells: bool = False,
) -> int:
    """Prepare the data, or a part of them; return the exit code, and have said what went wrong.

    How far it is stands in the file ``noted_in`` while it lasts, or is not shown but ``tells``.
    """
    shown = (None, None, reports.tell) if tells else (sys.stderr, noted_in)
    try:
        model = settings.model
        import_all(model.imports)
        if isinstance(model, NamedModel) and (
            model.other_positions or model.attention != "auto" or model.overrides
        ):
            from shardwright.train.model.pretrained import check_before_data  # which brings torch

            check_before_data(model, settings.objective)
        with progress.shown_on(*shown), progress.phase("preparing the data"):
            if part is None:
                prepare(settings, run_dir)
            else:
                prepare_part(settings, run_dir, *part)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except BaseException as error:
        from shardwright.train.data.tokens.shard_workers import WorkerEnded

        if isinstance(error, WorkerEnded):
            print(f"error: {error}", file=sys.stderr)
        elif why := exhausted.explained(error, remedies=_SMALLER, room=_ROOM):
            print(f"error: {why}", file=sys.stderr)
        else:
            traceback.print_exc()
        return FAILED
    return 0


_SMALLER = (
    "a smaller tokenizer.max_training_bytes where the tokenizer is being trained",
    "documents that are shorter: one is held in memory whole",
)
_ROOM = "free some space there, or set data.cache_dir to a directory with room"


if __name__ == "__main__":
    code = main()
    signals.ignore()
    sys.exit(code)
