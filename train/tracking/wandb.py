"""`tracking=wandb`: Weights & Biases, online or in files to be sent later."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from shardwright.train.config import RunConfig
from shardwright.train.config.tracking import (
    WandbTracking,
    most_cautious_mode,
    wandb_mode,
    wandb_name,
    wandb_project,
)
from shardwright.train.run_directory.names import WANDB_FOLDER
from shardwright.train.tracking.errors import in_a_line, note
from shardwright.train.tracking.lines import Line, numbers
from shardwright.train.tracking.tracker import Say, Target, Tracker

INIT_SECONDS = 60.0
"""How long W&B's server may take to answer before the run is written offline."""
FINISH_SECONDS = 20.0
"""How long W&B may take to send what is left at the end."""


class Wandb(Tracker[WandbTracking]):
    """Opens W&B; from the first failure on offline, which waits for no server."""

    name = "W&B"

    def __init__(
        self,
        config: RunConfig,
        section: WandbTracking,
        run_dir: Path,
        say: Say,
        *,
        is_offline: bool = False,
    ) -> None:
        super().__init__(config, section, run_dir, say, is_offline=is_offline)
        self._mode = most_cautious_mode(section.mode, wandb_mode(os.environ))
        self._why = ""
        """Why it is offline where the config has it online; told before where it lies."""
        if is_offline and self._mode == "online":
            self._mode, self._why = "offline", "W&B's server has not answered so far; "
        self._opened: _Run | None = None

    @property
    def disabled(self) -> str | None:
        if self._mode == "disabled":
            return "wandb disabled, by WANDB_MODE or WANDB_DISABLED"
        return None

    @property
    def later(self) -> str:
        return super().later if self._opened is None else self._opened.later

    def open(self) -> Target:
        import wandb

        mode, self._mode = self._mode, "offline"
        failed, self._why = self._why, ""
        if self._opened is not None:
            wandb.teardown()
        if mode == "online":
            try:
                self._opened = self._in(mode)
            except Exception as error:  # its own, those of its service and of the network
                note(self.name, error)
                failed = f"W&B cannot be reached ({in_a_line(error)}); "
                mode = "offline"
        if mode == "offline":
            self._opened = self._in(mode)
        assert self._opened is not None
        self.say(failed + self._opened.where)
        return self._opened

    def _in(self, mode: str) -> _Run:
        return _Run(self, mode, self.run_id(WANDB_FOLDER, "WANDB_RUN_ID"))


class _Run:
    """The run of W&B's that belongs to this directory; offline, all of it at each start."""

    def __init__(self, tracker: Wandb, mode: str, run_id: str) -> None:
        import wandb

        config, section = tracker.config, tracker.section
        self.mode = mode
        settings = wandb.Settings(
            console="off",  # this process prints nothing of the run
            init_timeout=INIT_SECONDS,
            login_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            x_stats_pid=os.getppid(),  # the rank,
        )
        self._run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            id=run_id,
            resume="allow",
            project=wandb_project(section, os.environ),
            entity=section.entity,
            name=wandb_name(config.name, os.environ),
            tags=section.tags or None,
            dir=os.environ.get("WANDB_DIR") or str(tracker.run_dir),
            config=config.model_dump(mode="json", by_alias=True),
            settings=settings,
        )
        # What its server has of steps that are trained again stays as it was first recorded.
        self._first_step = self._run.starting_step
        self._directory = Path(self._run.dir).parent

    @property
    def where(self) -> str:
        if self.mode == "online":
            return f"wandb online: {self._run.url}"
        return f"wandb offline; later: {self.later}"

    @property
    def later(self) -> str:
        return f"wandb sync {shlex.quote(str(self._directory))}"

    def write(self, line: Line) -> None:
        if line["step"] >= self._first_step:
            self._run.log({**numbers(line), "_timestamp": line["time"]}, step=line["step"])

    def caught_up(self) -> None:
        pass

    def finish(self, outcome: str) -> None:
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "done" else 1)

    def discard(self) -> None:
        pass  # torn down before the next one is opened
