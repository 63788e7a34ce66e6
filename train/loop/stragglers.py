"""Which rank is slower than the others, and whether ranks wait for data: of logged steps. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from shardwright.train.charts.panels import OF_RANKS
from shardwright.train.loop.step_times import Times

MARGIN = 0.25
"""Of the median step: a rank that needs so much more of it than the median rank is slow."""
STARVED = 0.2
"""A share of its step that a rank may wait for data, before that is said."""
LOGS = 3
"""In a row, before anything is said."""


def metrics(ranks: Sequence[Times]) -> dict[str, float]:
    """Return what a logged step tells of its ranks: least, median and most, and who that is."""
    told: dict[str, float] = {}
    for name in Times._fields:
        values = [getattr(times, name) for times in ranks]
        told[f"{name}_seconds/min"] = min(values)
        told[f"{name}_seconds/median"] = statistics.median(values)
        told[f"{name}_seconds/max"] = max(values)
        told[f"{name}{OF_RANKS}"] = values.index(max(values))
    return told


def slow(ranks: Sequence[Times]) -> set[int]:
    """Return the ranks that hold the others up, by what they compute or by their data."""
    if len(ranks) < 2:
        return set()
    own = [times.compute + times.data for times in ranks]
    step = statistics.median(sum(times) for times in ranks)
    # Of two ranks the median lies between them.
    usual = statistics.median_low(own)
    return {rank for rank, seconds in enumerate(own) if seconds - usual > MARGIN * step}


def starved(ranks: Sequence[Times]) -> bool:
    """Return whether the ranks, by their median, wait for data for long."""
    data, whole = ([f(times) for times in ranks] for f in (lambda t: t.data, sum))
    return statistics.median(data) > STARVED * statistics.median(whole)


class Watch:
    """Says, once, what has been so for several logs in a row, and again once it was otherwise."""

    def __init__(self, host_of: Callable[[int], str | None]) -> None:
        """``host_of`` returns the node of a rank, None where that is not known."""
        self._host_of = host_of
        self._slow_for: dict[int, int] = {}
        self._starved_for = 0

    def look(self, ranks: Sequence[Times]) -> list[str]:
        """Return what there is to say now of a logged step's ranks."""
        said = []
        now = slow(ranks)
        self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in sorted(now)}
        for rank, logs in self._slow_for.items():
            if logs == LOGS:
                said.append(self._of_slow(rank, ranks))
        self._starved_for = self._starved_for + 1 if starved(ranks) else 0
        if self._starved_for == LOGS:
            said.append(_of_starved(ranks))
        return said

    def _of_slow(self, rank: int, ranks: Sequence[Times]) -> str:
        mine, usual = ranks[rank], [times for at, times in enumerate(ranks) if at != rank]
        compute = statistics.median(times.compute for times in usual)
        data = statistics.median(times.data for times in usual)
        of_data = mine.data - data > mine.compute - compute
        what = "its data" if of_data else "computing"
        took, others = (mine.data, data) if of_data else (mine.compute, compute)
        host = self._host_of(rank)
        where = f" on node {host}" if host is not None else ""
        return (
            f"warning: rank {rank}{where} is slow: of each step {_said(took)} go into {what}, "
            f"{_said(others)} on the others, which wait for it; {LOGS} logs in a row"
        )


def _of_starved(ranks: Sequence[Times]) -> str:
    data = statistics.median(times.data for times in ranks)
    step = statistics.median(sum(times) for times in ranks)
    return (
        f"warning: training waits for data, {data / step:.0%} of each step ({_said(data)} of "
        f"{_said(step)}); raise trainer.dataloader_workers, or look at the disk that "
        "data.cache_dir is on"
    )


def _said(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"
