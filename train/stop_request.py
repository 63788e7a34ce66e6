"""Ask a run to stop from any node: a file in its directory, as signals end where a node does."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train import stop

FILE = "stop-request"
_KILL = "kill"
_GONE = {errno.ENOENT, errno.ESTALE}


@contextmanager
def heeded(run_dir: Path) -> Iterator[None]:
    """Have what is asked of a run reach its first rank, this process, inside of the block.

    It then is as if this process had got a signal, wherever it is and whatever it does.

    The file is there as long as somebody heeds it, and is emptied first: what an earlier start was
    asked does not count. A thread reads it again and again instead of looking whether it is there:
    for up to a minute NFS takes a file for missing that was so, but tells whoever opens one what is
    in it now.
    """
    path = run_dir / FILE
    with suppress(OSError):  # a full disk: this node's own signals are left
        path.write_bytes(b"")
    over = threading.Event()

    def listen() -> None:
        is_asked = False
        while not over.wait(stop.SECONDS_BETWEEN_LOOKS):
            lines = _lines(path)
            if _KILL in lines:
                path.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if lines and not is_asked:
                is_asked = True
                stop.ask(lines[0])

    listener = threading.Thread(target=listen, name="stop request", daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()
        with suppress(OSError):
            path.unlink(missing_ok=True)


def request(run_dir: Path, by: str, *, kill: bool = False) -> bool:
    """Ask the ranks of a run to stop, or to end at once; return whether its first rank heeds it.

    ``by`` says in a line who asks. To be called until the run is over: a rank that starts in
    between has not heard of it, and one that was asked before is not asked again.
    """
    try:
        # Never made: it would be left where the run has just ended.
        descriptor = os.open(run_dir / FILE, os.O_RDWR | os.O_APPEND)
        try:
            asked = os.read(descriptor, 4096).decode(errors="replace").splitlines()
            if not asked or (kill and _KILL not in asked):
                os.write(descriptor, f"{_KILL if kill else by}\n".encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return False
    return True


def said(run_dir: Path) -> str | None:
    """Return who has asked for the stop through the directory; None where nobody has."""
    return next((line for line in _lines(run_dir / FILE) if line != _KILL), None)


def _lines(path: Path) -> list[str]:
    """Return the whole lines of a file; none where it is not there, or cannot be read just now."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()
