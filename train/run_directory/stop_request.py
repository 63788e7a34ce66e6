"""Ask a run to stop from any node: a file in its directory, as signals end where a node does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from shardwright.train.run_directory.names import STOP_REQUEST

FILE = STOP_REQUEST
KILL = "kill"
_GONE = {errno.ENOENT, errno.ESTALE}


def request(run_dir: Path, by: str, *, kill: bool = False) -> bool:
    """Ask the ranks of a run to stop, or to end at once; return whether its first rank watches it.

    ``by`` says in a line who asks. To be called until the run is over: a rank that starts in
    between has not heard of it, and one that was asked before is not asked again.
    """
    try:
        # Never made: it would be left where the run has just ended.
        descriptor = os.open(run_dir / FILE, os.O_RDWR | os.O_APPEND)
        try:
            asked = os.read(descriptor, 4096).decode(errors="replace").splitlines()
            if not asked or (kill and KILL not in asked):
                os.write(descriptor, f"{KILL if kill else by}\n".encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return False
    return True


def said(run_dir: Path) -> str | None:
    """Return who has asked for the stop through the directory; None where nobody has."""
    return next((line for line in lines_of(run_dir / FILE) if line != KILL), None)


def lines_of(path: Path) -> list[str]:
    """Return the whole lines of a file; none where it is not there, or cannot be read just now."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()
