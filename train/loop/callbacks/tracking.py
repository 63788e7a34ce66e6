"""The tracker of a run: rank 0 starts its process, listens to it and ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback

from shardwright.train import program
from shardwright.train.config import RunConfig
from shardwright.train.console import progress

CLOSE_SECONDS = 30.0
"""How long a run that has ended waits for its tracker."""
STOP_SECONDS = 5.0
"""How long one waits that was told to stop, and may be killed soon."""

OFFLINE_SECONDS = 15.0
"""How long a tracker may take to write a run down that a server has kept waiting until its end."""


class Tracking(TrainerCallback):
    """A tracker that can neither stop a run nor hold it up: it is a process of its own.

    It reads metrics.jsonl; all that passes here is what a person is to be told.
    """

    def __init__(self, config: RunConfig, run_dir: Path, console: TextIO) -> None:
        self._config, self._run_dir, self._console = config, run_dir, console
        self._process: subprocess.Popen[bytes] | None = None
        self._heard = b""
        self._later = program.command("sync", str(run_dir))
        """What makes the tracker complete, out of metrics.jsonl or of its own files."""
        self._is_open = False
        self._is_late = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hear()

    def start(self, *flags: str) -> None:
        if self._config.tracking.kind == "none" or self._process is not None:
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shardwright.train.tracking", str(self._run_dir), *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **program.package_environment(os.environ)},
            )
        except OSError as error:  # no memory, or no room for a process more
            self._say(
                f"warning: tracking={self._config.tracking.kind} cannot be started ({error}); "
                f"training continues; later: {self._later}"
            )
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def close(self, outcome: str, seconds: float = CLOSE_SECONDS) -> None:
        """Tell the tracker how the run has ended, "done", "stopped" or "failed", and wait for it.

        One that takes longer is killed; what it lacks can be sent later, and that is said.
        """
        if self._process is None:
            return
        code = self._end(outcome, seconds)
        if code < 0 and not self._is_open and self._config.tracking.has_offline:
            # Its server has not answered yet, so there is nothing to sync either.
            self.start("--once", "--offline")
            code = self._end(outcome, OFFLINE_SECONDS)
        if code != 0:
            how = f"ended with exit code {code}"
            if code < 0:
                how = (
                    "took too long"
                    if self._is_late
                    else f"was killed by {signal.Signals(-code).name}"
                )
            self._say(
                f"warning: tracking={self._config.tracking.kind} {how} (see logs/rank-0.log); "
                f"later: {self._later}"
            )

    def _end(self, outcome: str, seconds: float) -> int:
        """Let the process end; return its exit code, below 0 where it was killed."""
        process = self._process
        if process is None:  # it could not be started
            return 0
        assert process.stdin is not None
        with suppress(OSError):  # it has ended
            process.stdin.write(f"{outcome}\n".encode())
            process.stdin.close()
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            self._hear()
            time.sleep(0.05)
        self._is_late = process.poll() is None
        if self._is_late:
            process.kill()
        code = process.wait()
        self._hear()
        self._process = None
        return code

    def _hear(self) -> None:
        """Tell what the process has said by now, without waiting for it."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        while read := self._process.stdout.read(4096):
            self._heard += read
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            told = json.loads(line)
            self._is_open, self._later = True, told["later"] or self._later
            self._say(told["text"])

    def _say(self, text: str) -> None:
        progress.write(text, self._console)
