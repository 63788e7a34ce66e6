"""The one thread of this process that writes a checkpoint while training continues."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from shardwright.train.process import group

logger = logging.getLogger(__name__)

_in_flight: threading.Thread | None = None


class Background:
    """Calls a function in a thread; at most one is in flight in a process."""

    def __init__(self, function: Callable[[], object]) -> None:
        global _in_flight
        assert _in_flight is None or not _in_flight.is_alive(), "one checkpoint at a time"
        self._function: Callable[[], object] | None = function
        self._error: BaseException | None = None
        # Daemonic, as a disk that hangs must not keep a failed rank alive.
        self._thread = _in_flight = threading.Thread(
            target=self._run, name="checkpoint", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        assert self._function is not None
        try:
            self._function()
        except BaseException as error:
            self._error = error
        finally:
            self._function = None  # it holds the copies and the process group

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the end; raise what the function raised."""
        self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def finish_writing(timeout_seconds: float) -> None:
    """Wait for the checkpoint in flight, if any: the process group must not be left before."""
    global _in_flight
    thread, _in_flight = _in_flight, None
    if thread is not None:
        thread.join(timeout_seconds)
        if thread.is_alive():
            logger.warning("a checkpoint is still being written after %g s", timeout_seconds)


group.before_leaving(finish_writing)
