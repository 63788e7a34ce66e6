"""A run's tracker, in a process of its own: `python -m shardwright.train.tracking RUN_DIR`.

It hands every line of metrics.jsonl on, as it is, so that trackers show the numbers of the run at
the run's steps; a line that a resume has dropped is not handed on again. Whatever it waits for or
fails at holds up nothing but this process.

Its stdin is open as long as the run lasts, and a word there says how that ended. It writes a line
of JSON to stdout for each thing that a person is to be told.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardwright.train import config as run_config
from shardwright.train.errors import FAILED
from shardwright.train.process import signals
from shardwright.train.process.arguments import decoded
from shardwright.train.run_directory.names import METRICS
from shardwright.train.tracking.handover import Handover
from shardwright.train.tracking.lines import Tail
from shardwright.train.tracking.registry import tracker_of
from shardwright.train.tracking.tracker import Say, Tracker

POLL_SECONDS = 0.5


def main(argv: list[str]) -> int:
    """Hand metrics on until the run has ended; return 0, even where a tracker has failed.

    With --once alone, as a person asks, the exit code tells of that.
    """
    for number in signals.HANDLED:  # its stdin says when to end
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(
        prog="python -m shardwright.train.tracking", description=__doc__
    )
    parser.add_argument("run_dir", type=decoded, help="the run's directory")
    parser.add_argument("--once", action="store_true", help="send what is there, and end")
    parser.add_argument("--offline", action="store_true", help="contact no server")
    options = parser.parse_args(argv)
    run_dir = Path(options.run_dir)
    # Libraries print freely, and stdout is for what this module says.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(text: str, later: str | None = None) -> None:
        with suppress(OSError):  # the rank is gone
            print(json.dumps({"text": text, "later": later}), file=out)

    config = run_config.load(run_dir)
    tracker = tracker_of(config, run_dir, say, is_offline=options.offline)
    if (why := tracker.disabled) is not None:
        say(why)
        return 0
    return _track(tracker, say, options)


def _track(tracker: Tracker[Any], say: Say, options: argparse.Namespace) -> int:
    handover = Handover(tracker, Tail(tracker.run_dir / METRICS), say)
    said = b"done\n" if options.once else b""
    is_open = not options.once
    handover.hand_over()
    while is_open and not said.endswith(b"\n"):
        if select.select([0], [], [], POLL_SECONDS)[0]:
            heard = os.read(0, 64)
            said += heard
            is_open = bool(heard)
        handover.hand_over()
    handover.finish(said.decode().strip() or "failed")
    if handover.problem is not None:
        say(
            f"warning: {tracker.name} lacks a part of this run ({handover.problem}); "
            f"later: {tracker.later}"
        )
        if options.once and not options.offline:  # a person has asked for it
            return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
