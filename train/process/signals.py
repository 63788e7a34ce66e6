"""What signals ask of a rank: each leaves a note, and all ranks agree on what comes of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from shardwright.train.errors import FAILED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""What asks a rank to stop. SIGUSR1 is the one that no launcher between acts on by itself."""
PROFILE = signal.SIGUSR2
"""What asks a rank to have its next steps profiled; no launcher between acts on it, either."""
HANDLED = (*SIGNALS, PROFILE)
SECONDS_BETWEEN_LOOKS = 0.5


CTRL_C = "Ctrl-C"


def by_whom(number: int) -> str:
    """Return what a person calls a signal: SIGINT is the key that was pressed. Pure."""
    return CTRL_C if number == signal.SIGINT else signal.Signals(number).name


class Stop(BaseException):
    """The work ends here, to be resumed later; raised on all ranks at one place."""


@dataclass(frozen=True)
class _Request:
    by: str
    time: float
    """On the monotonic clock."""


started_at = time.time()
"""When this process began to listen, seconds since the epoch."""
_request: _Request | None = None
_requester: str | None = None
_at_once = False
_heard = False
"""Whether the next signal is only to say that another rank was asked."""
_profile = False
"""Whether a profile is asked for that nobody has taken on yet."""


# --- one process --------------------------------------------------------------------------------


def install() -> None:
    """Have SIGNALS ask for a clean stop from now on, and PROFILE for a profile.

    Whoever started this process may block them.

    A second SIGINT kills, any other second signal changes nothing. What nohup ignores stays so.
    Below torchrun a second SIGINT changes nothing either: it passes its own one on, to ranks that
    may have got theirs already, and a terminal's Ctrl-C does not reach them (torch 2.13,
    elastic/multiprocessing/api.py, start_new_session).
    """
    global _request, _requester
    _request = _requester = None
    for number in SIGNALS:
        may_be_ignored = number in (signal.SIGHUP, signal.SIGINT)
        if not (may_be_ignored and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, _note)
    signal.signal(PROFILE, _note_profile)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)


def _note(number: int, frame: FrameType | None) -> None:
    global _request
    del frame
    if _heard:
        if _at_once:
            raise Stop
        return
    if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
        signal.signal(number, signal.SIG_DFL)
    if _request is None:
        _request = _Request(_requester or by_whom(number), time.monotonic())
        if _at_once:
            raise Stop


def _note_profile(number: int, frame: FrameType | None) -> None:
    del number, frame
    request_profile()


def request_profile() -> None:
    """Ask for a profile of the next steps; from any thread."""
    global _profile
    _profile = True


def take_profile_request() -> bool:
    """Return whether a profile was asked for since the last time."""
    global _profile
    taken, _profile = _profile, False
    return taken


def request_stop(by: str) -> None:
    """Have this process stop as a signal does; for another thread than the main one."""
    global _requester
    _requester = by
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGUSR1)


def asked() -> str | None:
    """Return who was the first to ask this very process to stop, None where nobody has.

    That is a signal's name, CTRL_C, or what `request_stop` was given.
    """
    return _request.by if _request else None


def seconds_since() -> float:
    """Return how long ago that was; 0 where there was none."""
    return time.monotonic() - _request.time if _request else 0.0


@contextmanager
def at_once() -> Iterator[None]:
    """Have a signal raise Stop inside of the block as soon as it comes, or has come before."""
    global _at_once
    _at_once = True
    try:
        if _request is not None:
            raise Stop
        yield
    finally:
        _at_once = False


@contextmanager
def unless(has_failed: Callable[[], bool]) -> Iterator[None]:
    """End this process where it is to stop, and waits inside of the block for who has failed.

    The block waits in C++, where no handler runs: its peers would come and then agree to stop, but
    one that has failed never comes. ``has_failed`` is asked in a thread.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    if _request is not None:
        os.write(writing, b"!")
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    over = threading.Event()

    def watch() -> None:
        asks = {bytes([PROFILE])}
        while (first := os.read(reading, 1)) in asks:
            pass  # which waits for the first step
        if first:
            while not over.wait(SECONDS_BETWEEN_LOOKS):
                if has_failed():
                    os.write(2, b"told to stop, and another rank has failed: not waiting for it\n")
                    os._exit(FAILED)

    watcher = threading.Thread(target=watch, name="stop unless", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def restore_defaults() -> None:
    """Let signals end this process as they end any other: it has failed, and holds up the rest."""
    _set_all(signal.SIG_DFL)


def hear(thread: int) -> None:
    """Interrupt a thread of this process because another rank was asked to stop."""
    global _heard
    _heard = True
    signal.pthread_kill(thread, signal.SIGUSR1)


def ignore() -> None:
    """Ignore signals from now on: all is done but for the exit, whose code they would change."""
    _set_all(signal.SIG_IGN)
    if signal.getsignal(PROFILE) == _note_profile:
        signal.signal(PROFILE, signal.SIG_IGN)


def _set_all(handler: signal.Handlers) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) == _note:
            signal.signal(number, handler)


def is_restarted_on_failure() -> bool:
    """Return whether torchrun would start the ranks again if they ended with any code but 0."""
    done = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return done < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
