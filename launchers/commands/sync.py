"""`shardwright sync RUN_DIR`: hand what its tracker lacks of a run's metrics on to it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shardwright.train import config as run_config
from shardwright.train.console import terminal
from shardwright.train.errors import FAILED, UserError
from shardwright.train.paths import absolute
from shardwright.train.program import package_environment
from shardwright.train.run_directory import owner


def main(arguments: Sequence[str]) -> int:
    """Run the tracker over metrics.jsonl once; return 1 where it still lacks a part."""
    run_dir = Path(absolute(parser().parse_args(arguments).run_dir))
    config = run_config.load(run_dir)
    if config.tracking.kind == "none":
        raise UserError(
            f"{run_dir} has no tracker (tracking=none): its metrics are in metrics.jsonl only"
        )
    whose, is_locked = owner.look(run_dir)
    if is_locked:
        raise UserError(
            f"{run_dir} belongs to {whose or 'a process that is alive'}, whose own tracker sends "
            "its metrics; wait until it has ended"
        )
    terminal.outlive()
    process = subprocess.Popen(
        [sys.executable, "-m", "shardwright.train.tracking", str(run_dir), "--once"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **package_environment(os.environ)},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(json.loads(line)["text"], flush=True)
        return FAILED if process.wait() else 0
    finally:
        process.kill()  # it ignores Ctrl-C
        process.wait()


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright sync`."""
    found = argparse.ArgumentParser(
        prog="shardwright sync",
        description="Send a tracker what it lacks of a run's metrics.jsonl: after a full disk, "
        "a tracker that was killed, a server that did not answer.",
        epilog="Exit codes: 0, 1 if some is still missing, 2 on bad input.",
    )
    found.add_argument("run_dir", metavar="RUN_DIR")
    return found
