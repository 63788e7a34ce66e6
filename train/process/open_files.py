"""How many files and sockets a rank may have open, and how many it comes to need."""

from __future__ import annotations

import resource

ENOUGH = 65_536
"""For ten thousand ranks; a table of all the files that a kernel allows would take memory."""
GLOO_GROUPS = 3
"""Of all ranks: the run's own, the one in which saves agree, and the engine's."""
OTHER_FILES = 1024
"""Shards, samples, logs, libraries, stores: well above what a rank on its own has open."""


def needed_open_files(world_size: int) -> int:
    """Return how many files and sockets a rank may come to have open. Pure.

    In each group gloo connects every rank with every other one by a socket, and listens on one
    (torch 2.13), in runs on GPUs too: what lies in host memory travels over gloo.
    """
    return OTHER_FILES + GLOO_GROUPS * world_size


def raise_open_file_limit() -> None:
    """Allow this process, and those it starts, as many as whoever has started it permits.

    The usual soft limit is 1,024, for programs that use select(); the hard one is higher.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = raised(soft, hard)
    if wanted != soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def raised(soft: int, hard: int) -> int:
    """Return the soft limit to have: never lower than it is, never above the hard one. Pure."""
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH:
        return soft
    return ENOUGH if hard == resource.RLIM_INFINITY else max(soft, min(ENOUGH, hard))
