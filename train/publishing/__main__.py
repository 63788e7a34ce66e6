"""A run's pushes, in a process of its own: `python -m shardwright.train.publishing RUN_DIR`.

It looks for saves by itself, so that the training neither waits for it nor tells it anything; its
stdin is open as long as the run lasts, and a word there says how that ended. It writes a line of
JSON to stdout for each thing that a person is to be told.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path

from shardwright.train import config as run_config
from shardwright.train.errors import FAILED
from shardwright.train.process import signals
from shardwright.train.process.arguments import decoded
from shardwright.train.publishing.publisher import Publisher

POLL_SECONDS = 1.0
NICENESS = 19
"""The training goes first."""


def main(argv: list[str]) -> int:
    """Push until the run has ended; return whether the end of it could not be pushed."""
    for number in signals.HANDLED:  # its stdin says when to end
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    run_dir = Path(decoded(argv[0]))
    # Libraries print freely, and stdout is for what this module says.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        with suppress(OSError):  # the rank is gone
            print(json.dumps({"text": text}), file=out)

    publisher = Publisher(run_dir, run_config.load(run_dir), say)
    said, is_open = b"", True
    while is_open and not said.endswith(b"\n"):
        publisher.look()
        if select.select([0], [], [], POLL_SECONDS)[0]:
            heard = os.read(0, 64)
            said += heard
            is_open = bool(heard)
    failed = publisher.finish(said.decode().strip() or "failed")
    return FAILED if failed else 0


if __name__ == "__main__":
    # Neither a GPU's memory nor the cores that ranks compute on.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
