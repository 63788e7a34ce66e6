"""What a process tells who has started it on another node: lines among what else it prints."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from shardwright.train.console.progress import Phase

MARK = "shardwright-report: "
"""Begins each line; a login shell, or a library, may print others."""
STOP = "stop "
"""Begins what such a process may be told; who asks follows."""
_lock = threading.Lock()


class Far(NamedTuple):
    """How far a phase is."""

    phase: str
    unit: str
    total: float | None
    done: float
    starts_at: float
    counts: Mapping[str, int]
    is_over: bool


class Said(NamedTuple):
    """A line for the user."""

    text: str


def tell(phase: Phase) -> None:
    """Tell how far a phase of this process is."""
    _write(
        Far(
            phase.name,
            phase.unit,
            phase.total,
            phase.done,
            phase.starts_at,
            phase.counts,
            phase.is_over,
        )
    )


class Lines(logging.Handler):
    """Tells what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        _write(Said(self.format(record)))


def read(line: str) -> Far | Said | None:
    """Return what a line tells; None where it is another's. Pure."""
    if not line.startswith(MARK):
        return None
    told: Any = json.loads(line.removeprefix(MARK))
    return Said(told[0]) if len(told) == 1 else Far(*told)


def _write(told: Far | Said) -> None:
    text = f"{MARK}{json.dumps(list(told))}\n".encode()
    with _lock:  # whoever reads it may be gone, which the process hears of otherwise
        try:
            while text:
                text = text[os.write(1, text) :]
        except OSError:
            pass
