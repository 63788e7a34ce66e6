"""How much memory this process has and has had, and whether it keeps what it has freed."""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Mapping
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_NEVER, _LARGEST = -1, 2**31 - 1
_CHOSEN_BY_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_what_is_freed(environment: Mapping[str, str]) -> bool:
    """Have glibc use freed memory again, where it gives large blocks back to the system at once.

    A step on a CPU allocates the same tensors as the last one. From the system each page comes
    zeroed, at its first touch: 200,000 to 600,000 faults a step of GPT-2 small. Returns False where
    there is another C library, or the ``environment`` has settings of its own.
    """
    if any(name in environment for name in _CHOSEN_BY_USERS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def resident_bytes() -> int:
    """Return the memory that this process has now; its peak where there is no /proc."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """Return the most memory that this process has had.

    Not getrusage's answer, which lasts over exec: it may be that of the process that has
    started this one.
    """
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024
