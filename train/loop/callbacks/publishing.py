"""What pushes a run to a hub while it trains: rank 0 starts its process, hears it and ends it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback

from shardwright.train import program
from shardwright.train.config import CheckpointConfig
from shardwright.train.console import progress
from shardwright.train.process.companion import Companion

STOP_SECONDS = 5.0
"""How long a run waits that has not come to its end, and may be killed soon."""
logger = logging.getLogger(__name__)


class Publishing(TrainerCallback):
    """Pushes that can neither stop a run nor hold it up; only its end waits for the last one."""

    def __init__(self, settings: CheckpointConfig, run_dir: Path, console: TextIO) -> None:
        self._settings, self._run_dir, self._console = settings, run_dir, console
        self._companion: Companion | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._companion is not None:
            self._companion.hear()

    def start(self) -> None:
        try:
            self._companion = Companion(
                "shardwright.train.publishing",
                [str(self._run_dir)],
                lambda line: self._say(line["text"]),
            )
        except OSError as error:  # no memory, or no room for a process more
            self._say(f"warning: nothing is pushed ({error}); training continues; {self._later()}")

    def close(self, outcome: str) -> None:
        """Say how the run has ended, "done", "stopped" or "failed", and wait for the last push."""
        if self._companion is None:
            return
        companion, self._companion = self._companion, None
        is_done = outcome == "done"
        if is_done:
            progress.now("pushing the model")
        seconds = self._settings.push_wait_seconds if is_done else STOP_SECONDS
        code = companion.end(outcome, seconds)
        if code is None and is_done:
            self._say(
                f"warning: the push of final/ was not done in checkpoint.push_wait_seconds="
                f"{seconds:g}; {self._later()}"
            )
        elif code != 0 and is_done:
            self._say(f"warning: final/ is not pushed; {self._later()}")

    def _later(self) -> str:
        to = str(self._settings.push_to)
        words = () if self._settings.push_private else ("--public",)
        return f"later: {program.command('push', str(self._run_dir), to, *words)}"

    def _say(self, text: str) -> None:
        if text.startswith("warning: "):
            logger.warning(text.removeprefix("warning: "))
        progress.write(text, self._console)
