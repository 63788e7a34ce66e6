"""How much memory this process has and has had."""

from __future__ import annotations

import re
import resource
from pathlib import Path


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
