"""Watch for a request to stop, or for a profile, while a run continues."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardwright.train.console.reports import STOP
from shardwright.train.process import signals
from shardwright.train.run_directory.names import PROFILE_REQUEST
from shardwright.train.run_directory.stop_request import FILE, KILL, lines_of


@contextmanager
def watch_for_stop(run_dir: Path) -> Iterator[None]:
    """Have what is asked of a run reach its first rank, this process, inside of the block.

    It then is as if this process had got a signal, wherever it is and whatever it does.

    The file is there as long as somebody watches it, and is emptied first: what an earlier start
    was asked does not count. A thread reads it again and again instead of testing for it:
    for up to a minute NFS takes a file for missing that was so, but tells whoever opens one what is
    in it now.
    """
    path, profile = run_dir / FILE, run_dir / PROFILE_REQUEST
    with suppress(OSError):  # a full disk: this node's own signals are left
        path.write_bytes(b"")
        profile.write_bytes(b"")
    over = threading.Event()

    def listen() -> None:
        is_asked, profiles = False, 0
        while not over.wait(signals.SECONDS_BETWEEN_LOOKS):
            lines = lines_of(path)
            if KILL in lines:
                path.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if lines and not is_asked:
                is_asked = True
                signals.request_stop(lines[0])
            if (count := len(lines_of(profile))) > profiles:
                signals.request_profile()
            profiles = count

    listener = threading.Thread(target=listen, name="stop request", daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()
        with suppress(OSError):
            path.unlink(missing_ok=True)
            profile.unlink(missing_ok=True)


@contextmanager
def stop_with_standard_input() -> Iterator[None]:
    """Have this process stop when its standard input tells it to, or ends, inside of the block.

    A remote shell keeps it open as long as there is who has started it: neither signals nor that
    one's death get to another node otherwise.
    """
    over = threading.Event()

    def listen() -> None:
        text = b""
        while not over.is_set():
            if not select.select([0], [], [], signals.SECONDS_BETWEEN_LOOKS)[0]:
                continue
            read = os.read(0, 4096)
            text += read
            if b"\n" in text or not read:
                line = text.decode(errors="replace").partition("\n")[0]
                signals.request_stop(line.removeprefix(STOP) or "the end of what has started it")
                return

    listener = threading.Thread(target=listen, name="stop request", daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()
