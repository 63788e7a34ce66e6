"""Whether a process of this host still runs."""

from __future__ import annotations

import os


def is_alive(pid: int) -> bool:
    """Return whether there is a process of that number, whoever it belongs to."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
