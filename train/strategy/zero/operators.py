"""DeepSpeed's operators are compiled on first use, in the ranks: what their build needs."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import sysconfig
import time
from pathlib import Path

logger = logging.getLogger(__name__)


QUIET_SECONDS = 180
"""A build adds a file to its folder more often than this: each is one source, compiled."""

_CHECK = "lock.check"


def ready_to_build(*operators: str) -> None:
    """Let DeepSpeed find its build tool, free abandoned locks, and say what will take minutes.

    Waits for a build that another process has under way.
    """
    # pip puts ninja beside the interpreter, which an inactive virtual environment has not in PATH.
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])
    for operator in operators:
        folder = _build_directory(operator)
        _wait_for(folder / "lock")
        if not (folder / f"{operator}.so").exists():
            logger.warning("DeepSpeed compiles its operator %s, once: this takes minutes", operator)


def is_abandoned(lock: Path) -> bool:
    """Whether a build's lock was left by one that was killed: torch would wait on it forever.

    torch keeps its lock open until it removes it (FileBaton, torch 2.13): on one machine that
    tells. A process elsewhere, on a shared file system or in another container, shows itself by
    what it writes into the folder.
    """
    try:
        written = max(
            entry.stat().st_mtime for entry in os.scandir(lock.parent) if entry.name != _CHECK
        )
        return time.time() - written > QUIET_SECONDS and not is_open(lock)
    except FileNotFoundError:
        return False


def is_open(path: Path) -> bool:
    """Whether a process that may be looked into has the file open."""
    wanted = path.stat()
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # a socket, or gone, or somebody else's
            found = os.stat(descriptor)
            if os.path.samestat(found, wanted):
                return True
    return False


def _wait_for(lock: Path) -> None:
    """Return once no build holds the lock; one that nobody holds is removed."""
    said = False
    while lock.exists():
        # One process at a time, or another would remove the lock of the build that follows.
        with open(lock.parent / _CHECK, "a") as check:
            fcntl.lockf(check, fcntl.LOCK_EX)
            if is_abandoned(lock):
                logger.warning("%s was left by a build that was killed: removed", lock)
                lock.unlink()
                return
        if not said:
            logger.warning("waiting for the build that holds %s", lock)
            said = True
        time.sleep(0.5)


def _build_directory(operator: str) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(operator, verbose=False))
