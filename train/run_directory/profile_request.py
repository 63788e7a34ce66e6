"""Ask a run for a profile from any node: a line in a file of its directory."""

from __future__ import annotations

import os
from pathlib import Path

from shardwright.train.run_directory.names import PROFILE_REQUEST


def request(run_dir: Path, by: str) -> bool:
    """Ask for a profile of the next steps; return whether the run's first rank watches for it."""
    try:
        # Never made: it would be left where the run has just ended.
        descriptor = os.open(run_dir / PROFILE_REQUEST, os.O_WRONLY | os.O_APPEND)
    except OSError:
        return False
    try:
        os.write(descriptor, f"{by}\n".encode())
    finally:
        os.close(descriptor)
    return True
