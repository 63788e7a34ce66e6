"""A run as it goes, in one line of whatever width: how far it is, how well and how fast. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shardwright.train.console import cells
from shardwright.train.units import duration, size

GAP = "  "
BAR_COLUMNS = (8, 30)
"""The least and the most columns of the bar, which is drawn where there is room."""
SILENT_SECONDS = 120.0
"""A run that logs often is silent after this."""
SILENT_INTERVALS = 4.0
"""One that logs rarely is silent after this many of its own intervals."""
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Fact:
    """Something to say in a line."""

    text: str
    rank: int
    """Where there is no room, the fact of the highest rank goes first."""


def facts(
    last: Mapping[str, Any], total: int | None, left_seconds: float | None, silent: float | None
) -> list[Fact]:
    """Return what is known of a run that trains, in the order in which it is shown."""
    step = last.get("step")
    sent = last.get("sent_bytes_per_second")
    steps = f"step {step}/{total}" if total else f"step {step}"
    shown = [
        (0, steps if step is not None else None),
        (2, _number("loss", last.get("loss"), ".4f")),
        (5, _number("held-out loss", last.get("eval_loss"), ".4f")),
        (4, _after(last.get("tokens_per_second"), ",.0f", "tokens/s")),
        (6, None if last.get("mfu") is None else f"MFU {last['mfu']:.1%}"),
        (8, None if sent is None else f"{size(sent)}/s sent"),
        (7, None if last.get("peak_memory_bytes") is None else size(last["peak_memory_bytes"])),
        (3, None if left_seconds is None else f"{duration(left_seconds)} left"),
        (1, None if silent is None else f"silent for {duration(silent)}"),
    ]
    return [Fact(text, rank) for rank, text in shown if text is not None]


def fitted(found: Sequence[Fact], columns: int) -> str:
    """Return as many facts as fit, cut where not even the first one does."""
    kept = list(found)
    while len(kept) > 1 and _width(kept) > columns:
        kept.remove(max(kept, key=lambda fact: fact.rank))
    return cells.cut(GAP.join(fact.text for fact in kept), columns)


def drawn(found: Sequence[Fact], share: float | None, columns: int) -> str:
    """Return the line with a bar in front where the facts leave room for one."""
    text = fitted(found, columns)
    least, most = BAR_COLUMNS
    if share is None or len(text) < _width(found):
        return text
    percent = f"{share:4.0%} "
    room = columns - cells.width(text) - len(percent) - len(GAP)
    return text if room < least else f"{percent}{bar(share, min(room, most))}{GAP}{text}"


def bar(share: float, columns: int) -> str:
    """Return a bar of so many columns."""
    eighths = round(max(0.0, min(1.0, share)) * columns * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(columns, "·")


def silent_seconds(times: Sequence[float], now: float) -> float | None:
    """Return how long a run has been silent; None where its next line is not overdue yet.

    ``times`` are those of its last lines, in seconds since 1970.
    """
    if not times:
        return None
    intervals = sorted(later - earlier for earlier, later in pairwise(times))
    usual = intervals[len(intervals) // 2] if intervals else 0.0
    since = now - times[-1]
    return since if since > max(SILENT_SECONDS, SILENT_INTERVALS * usual) else None


def _width(found: Sequence[Fact]) -> int:
    return sum(cells.width(f.text) for f in found) + len(GAP) * max(0, len(found) - 1)


def _number(name: str, value: float | None, form: str) -> str | None:
    return None if value is None else f"{name} {value:{form}}"


def _after(value: float | None, form: str, unit: str) -> str | None:
    return None if value is None else f"{value:{form}} {unit}"
