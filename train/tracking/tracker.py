"""What a tracker is to the process that feeds it, and what holds where a kind says nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

from shardwright.train import program
from shardwright.train.config import RunConfig
from shardwright.train.config.tracking import TrackingSection
from shardwright.train.durable import write_text
from shardwright.train.tracking.lines import Line

RUN_ID = "shardwright-run-id"
"""In a tracker's folder of the run directory: which of its runs this is, over all resumes."""

Say = Callable[..., None]
"""Tells a person a text; ``later=`` is the command that makes the tracker complete."""

SectionT = TypeVar("SectionT", bound=TrackingSection)


class Target(Protocol):
    """Where lines go. Its methods raise whatever its library raises.

    It gets all lines of metrics.jsonl from the first on, those that it had before included: no
    point may stand there twice, none may be missing.
    """

    def write(self, line: Line) -> None: ...

    def caught_up(self) -> None:
        """Make what was written visible."""

    def finish(self, outcome: str) -> None:
        """End as the run has: "done", "stopped" or "failed"."""

    def discard(self) -> None:
        """Leave what has failed, so that another can be opened. Raises nothing."""


class Tracker(Generic[SectionT]):
    """One tracker of one run, for as long as the process lives; a kind overrides what differs."""

    name: ClassVar[str]
    """As people know it."""

    def __init__(
        self,
        config: RunConfig,
        section: SectionT,
        run_dir: Path,
        say: Say,
        *,
        is_offline: bool = False,
    ) -> None:
        self.config = config
        self.section = section
        """The config's section "tracking", as that of this kind."""
        self.run_dir = run_dir
        self.is_offline = is_offline
        """Contact no server, where it can do without."""
        self._say = say
        self._said = ""

    @property
    def disabled(self) -> str | None:
        """Why nothing is to be sent, in words; None where there is."""
        return None

    @property
    def later(self) -> str:
        """The command that makes the tracker complete once the run has ended."""
        return program.command("sync", str(self.run_dir))

    def open(self) -> Target:
        """Return where lines go from now on; called again after each failure."""
        raise NotImplementedError

    def say(self, text: str) -> None:
        """Tell where the run is to be seen, once for as long as that is so."""
        if text != self._said:
            self._said = text
            self._say(text, later=self.later)

    def run_id(self, folder: str, variable: str | None = None) -> str:
        """Return the run's id, which its first start chooses, or a variable of its environment."""
        path = self.run_dir / folder / RUN_ID
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            pass
        path.parent.mkdir(exist_ok=True)
        found = (os.environ.get(variable) if variable else None) or secrets.token_hex(4)
        write_text(path, f"{found}\n")
        return found
