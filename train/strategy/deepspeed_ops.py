"""DeepSpeed's operators are compiled on first use, in the ranks: what their build needs."""

from __future__ import annotations

import contextlib
import os
import sysconfig
import time
from pathlib import Path

from train.logs import log

LONGEST_BUILD_SECONDS = 1200
"""A lock that is older belongs to a build that was killed."""


def ready_to_build(*operators: str) -> None:
    """Let DeepSpeed find its build tool, free abandoned locks, and say what will take minutes."""
    # pip puts ninja beside the interpreter, which an inactive virtual environment has not in PATH.
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])
    for operator in operators:
        folder = _build_directory(operator)
        _drop_abandoned_lock(folder / "lock")
        if not (folder / f"{operator}.so").exists():
            log.warning("DeepSpeed compiles its operator %s, once: this takes minutes", operator)


def _build_directory(operator: str) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(operator, verbose=False))


def _drop_abandoned_lock(lock: Path) -> None:
    """Remove the lock of a build that was killed, on which torch would wait for ever."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - lock.stat().st_mtime > LONGEST_BUILD_SECONDS:
            lock.unlink()
