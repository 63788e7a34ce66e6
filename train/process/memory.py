"""How much memory this process has and has had, and whether it keeps what it has freed."""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import suppress
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


def available_bytes(
    proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the memory that new processes may take before any has to give; None if nobody tells.

    What the machine has left, or a control group above this process within its limit: pages of
    files, which count as its own, make room.
    """
    found: list[int] = []
    with suppress(OSError):
        if match := re.search(r"MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text()):
            found.append(int(match[1]) * 1024)
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                mounted = groups / controllers
                names = _NEW if controllers == "" else _OLD
                found += _left_in_groups(mounted, path, *names)
    return max(0, min(found)) if found else None


_NEW = ("memory.max", "memory.current", "inactive_file")
_OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left_in_groups(
    mounted: Path, path: str, limit: str, usage: str, pages_of_files: str
) -> Iterator[int]:
    """Yield what each group of a path has left; a container may see its own alone, as the root."""
    group = mounted / path.lstrip("/")
    while group.is_relative_to(mounted):
        with suppress(OSError, ValueError):  # "max" is no limit
            most, used = (int((group / name).read_text()) for name in (limit, usage))
            stat = (group / "memory.stat").read_text()
            match = re.search(rf"^{pages_of_files} (\d+)$", stat, re.MULTILINE)
            yield most - used + (int(match[1]) if match else 0)
        group = group.parent


def _status(field: str) -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024
