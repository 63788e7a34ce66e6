"""Lines are handed on to a tracker; one that fails is told of once, and tried again."""

from __future__ import annotations

import time
from typing import Any

from shardwright.train.tracking.errors import in_a_line, note
from shardwright.train.tracking.lines import Tail
from shardwright.train.tracking.tracker import Say, Target, Tracker

RETRY_SECONDS = (10.0, 300.0)
"""The first wait before a tracker that failed is tried again, and the longest."""


class Handover:
    """Hands lines on to a tracker, and opens it anew where it fails."""

    def __init__(self, tracker: Tracker[Any], tail: Tail, say: Say) -> None:
        self._tracker, self._tail, self._say = tracker, tail, say
        self._target: Target | None = None
        self._retry_at = 0.0
        self._wait_seconds = RETRY_SECONDS[0]
        self.problem: str | None = None
        """Why the tracker lacks lines at present."""
        self._is_told = False

    def hand_over(self, *, at_last: bool = False) -> None:
        """Hand on what has come; ``at_last`` tries one that fails once more in any case."""
        if self._target is None and time.monotonic() < self._retry_at and not at_last:
            return
        try:
            if self._target is None:
                self._tail.rewind()
                self._target = self._tracker.open()
            for line in self._tail.lines():
                self._target.write(line)
            self._target.caught_up()
        except Exception as error:  # whatever tracker libraries raise
            self._failed(error)
        else:
            self.problem, self._wait_seconds = None, RETRY_SECONDS[0]

    def finish(self, outcome: str) -> None:
        """Hand on the rest and close the tracker."""
        self.hand_over(at_last=True)
        if self._target is None:
            return
        try:
            self._target.finish(outcome)
        except Exception as error:
            self.problem = in_a_line(error)

    def _failed(self, error: Exception) -> None:
        self.problem = in_a_line(error)
        note(self._tracker.name, error)
        if not self._is_told:
            self._is_told = True
            self._say(
                f"warning: {self._tracker.name} fails ({self.problem}); training continues, and "
                "what is missing there is written once that is possible again"
            )
        if self._target is not None:
            self._target.discard()
        self._target = None
        self._retry_at = time.monotonic() + self._wait_seconds
        self._wait_seconds = min(2 * self._wait_seconds, RETRY_SECONDS[1])
