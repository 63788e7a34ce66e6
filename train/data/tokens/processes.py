"""How many processes tokenise side by side: one on each core, as far as memory allows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shardwright.train.process.memory import available_bytes
from shardwright.train.units import size

EACH_BYTES = 2**29
"""At most 0.45 GiB were measured, of corpora of 100 MB and 1 GB of every kind of file; one whose
document has hundreds of megabytes takes more."""
FILTER_BYTES = 2**28
"""Of a filter's own process, one beside each: an interpreter, what it imports, some documents."""
log = logging.getLogger(__name__)


def affordable(wanted: int, available: int | None, each: int) -> int:
    """Return how many processes there are to be, of those ``wanted``: at least one. Pure.

    ``available`` is the memory that there is for them, None where that is not known.
    """
    return wanted if available is None else max(1, min(wanted, available // each))


def cores_for(cores: Sequence[int], wanted: int, *, has_filter: bool) -> Sequence[int]:
    """Return on which cores to have a process each, of the first ``wanted``; say if memory says so.

    Memory that runs out takes the whole preparation with it, or what else runs on the node.
    """
    each = EACH_BYTES + (FILTER_BYTES if has_filter else 0)
    available = available_bytes()
    wanted = min(wanted, len(cores))
    count = affordable(wanted, available, each)
    if count < wanted:
        log.info(
            "%d of %d processes, one for each core: each may take %s of memory, and %s are free",
            count,
            wanted,
            size(each),
            size(available or 0),
        )
    return cores[:count]
