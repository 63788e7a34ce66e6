"""The tracker of a run: rank 0 starts its process, listens to it and ends it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback

from shardwright.train import program
from shardwright.train.config import RunConfig
from shardwright.train.console import progress
from shardwright.train.process.companion import Companion

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
        self._companion: Companion | None = None
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
        if self._config.tracking.kind == "none" or self._companion is not None:
            return
        try:
            arguments = (str(self._run_dir), *flags)
            self._companion = Companion("shardwright.train.tracking", arguments, self._told)
        except OSError as error:  # no memory, or no room for a process more
            self._say(
                f"warning: tracking={self._config.tracking.kind} cannot be started ({error}); "
                f"training continues; later: {self._later}"
            )

    def close(self, outcome: str, seconds: float = CLOSE_SECONDS) -> None:
        """Tell the tracker how the run has ended, "done", "stopped" or "failed", and wait for it.

        One that takes longer is killed; what it lacks can be sent later, and that is said.
        """
        if self._companion is None:
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
        companion, self._companion = self._companion, None
        if companion is None:  # it could not be started
            return 0
        code = companion.end(outcome, seconds)
        self._is_late = code is None
        return -signal.SIGKILL if code is None else code

    def _hear(self) -> None:
        if self._companion is not None:
            self._companion.hear()

    def _told(self, line: Any) -> None:
        self._is_open, self._later = True, line["later"] or self._later
        self._say(line["text"])

    def _say(self, text: str) -> None:
        progress.write(text, self._console)
