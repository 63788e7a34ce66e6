"""From the events of a trace to what each step was spent on: parts that add up to it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Event = Mapping[str, Any]
"""Of Chrome's trace format; times are in microseconds."""
Interval = tuple[float, float]
Name = Literal["compute", "communication", "copies", "data", "host"]

STEP = "ProfilerStep#"
"""What an annotation is called that spans a step, as those of torch's own schedules are."""
DATA = "shardwright: data"
"""What the one is called that spans the assembly of a batch."""

PARTS: tuple[Name, ...] = ("compute", "communication", "copies", "data", "host")

# torch 2.13: gloo's work is annotated by the thread that does it, NCCL's is a kernel.
_COMMUNICATION = re.compile(r"gloo:|nccl|ncclKernel|ncclDevKernel", re.IGNORECASE)
# Operators that only start or await a collective, and nodes of autograd, which may wait for one.
_NO_ARITHMETIC = re.compile(r"(c10d|_?c10d_functional|autograd|torch::autograd)::")
# DeepSpeed's Adam on a CPU is no operator of torch's; torch annotates the steps of all optimizers.
_CPU_ADAM = re.compile(r"Optimizer\.step#DeepSpeedCPU")


@dataclass(frozen=True)
class Step:
    """What one step was spent on, in seconds."""

    number: int
    seconds: float
    parts: Mapping[Name, float]
    """They add up to ``seconds``; communication is what nothing else ran beside."""
    hidden: float
    """Communication that ran beside compute, in no part of its own."""


@dataclass(frozen=True)
class Called:
    """All operations of one name in the steps of a trace."""

    name: str
    calls: int
    seconds: float
    """From its start to its end, waiting included; where several ran at once, of each."""


def steps_of(events: Sequence[Event]) -> list[Step]:
    """Return the steps that a trace spans, in their order.

    With kernels in it the parts are what the device does, first come first: compute, or else
    communication, or else copies; where it does nothing, data is being assembled or the host holds
    it up. Without, they are what the main thread does: assemble data, or else compute, or else wait
    for a collective that is under way, or else whatever Python does.
    """
    spans = _steps(events)
    if not spans:
        return []
    on_device = any(event.get("cat") == "kernel" for event in events)
    main = next(iter(spans.values()))
    does = _on_device(events, main) if on_device else _on_cpu(events, main)
    order: tuple[Name, ...] = ("compute", "communication", "copies", "data")
    if not on_device:
        order = ("data", "compute", "communication")
    return [
        _step(number, _interval(span), does, order)
        for number, span in sorted(spans.items(), key=lambda item: item[1]["ts"])
    ]


def communication_of(events: Sequence[Event]) -> list[Called]:
    """Return the collectives of a trace, by name, those with the most time first."""
    spans = list(_steps(events).values())
    found: dict[str, list[float]] = {}
    for event in _collectives(events):
        if any(s["ts"] <= event["ts"] < s["ts"] + s["dur"] for s in spans):
            found.setdefault(event["name"].partition("(")[0], []).append(event["dur"])
    called = [Called(name, len(each), sum(each) / 1e6) for name, each in found.items()]
    return sorted(called, key=lambda each: -each.seconds)


def most_allocated(events: Sequence[Event]) -> int | None:
    """Return the most bytes that a trace has allocated and not yet freed; None if none says so.

    Where its process is on a GPU that is the device's memory, and else the host's.
    """
    found = [e for e in events if e.get("name") == "[memory]"]
    of_device = [e for e in found if e["args"]["Device Type"] != 0]
    totals = [e["args"]["Total Allocated"] for e in of_device or found]
    return max(totals) - totals[0] if totals else None


# --- which events are what ------------------------------------------------------------------------


def _steps(events: Iterable[Event]) -> dict[int, Event]:
    return {
        int(event["name"].removeprefix(STEP)): event
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(STEP)
    }


def _collectives(events: Sequence[Event]) -> list[Event]:
    """Return what communicates: kernels where there are some, or else the work of gloo's threads.

    Beside kernels gloo only carries what ranks agree on, which no device waits for.
    """
    for category in ("kernel", "user_annotation"):
        found = [e for e in events if e.get("cat") == category and _COMMUNICATION.match(e["name"])]
        if found or any(e.get("cat") == "kernel" for e in events):
            return found
    return []


def _on_device(events: Sequence[Event], main: Event) -> dict[Name, list[Interval]]:
    communication = _collectives(events)
    known = {id(event) for event in communication}
    return {
        "compute": _union(
            _interval(e)
            for e in events
            if e.get("cat") in ("kernel", "gpu_memset") and id(e) not in known
        ),
        "communication": _union(map(_interval, communication)),
        "copies": _union(_interval(e) for e in events if e.get("cat") == "gpu_memcpy"),
        "data": _union(_interval(e) for e in _of_thread(events, main) if e["name"] == DATA),
    }


def _on_cpu(events: Sequence[Event], main: Event) -> dict[Name, list[Interval]]:
    mine = list(_of_thread(events, main))
    return {
        "compute": _union(_interval(event) for event in mine if _is_arithmetic(event)),
        "communication": _union(map(_interval, _collectives(events))),
        "data": _union(_interval(event) for event in mine if event["name"] == DATA),
    }


def _is_arithmetic(event: Event) -> bool:
    name = event["name"]
    if event["cat"] == "user_annotation":
        return _CPU_ADAM.match(name) is not None
    return event["cat"] == "cpu_op" and "::" in name and _NO_ARITHMETIC.match(name) is None


def _of_thread(events: Iterable[Event], other: Event) -> Iterator[Event]:
    """Yield the spans of time of the thread that another event is of."""
    for event in events:
        if event.get("ph") == "X" and "cat" in event and event["tid"] == other["tid"]:
            yield event


# --- sets of intervals, sorted and disjoint -------------------------------------------------------


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _step(
    number: int,
    span: Interval,
    does: Mapping[Name, list[Interval]],
    order: Sequence[Name],
) -> Step:
    """Give each moment of a step to the first in the order that it belongs to, or to the host."""
    left, parts = [span], dict.fromkeys(PARTS, 0.0)
    for name in order:
        taken = _common(left, does[name])
        parts[name] = _length(taken) / 1e6
        left = _without(left, taken)
    parts["host"] = _length(left) / 1e6
    hidden = _common(_common([span], does["communication"]), does["compute"])
    return Step(number, _length([span]) / 1e6, parts, _length(hidden) / 1e6)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _common(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    found, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        begin, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if begin < end:
            found.append((begin, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def _without(some: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """Return what is left of intervals without others, each of which lies in one of them."""
    found, j = [], 0
    for begin, end in some:
        while j < len(taken) and taken[j][0] < end:
            if begin < taken[j][0]:
                found.append((begin, taken[j][0]))
            begin = taken[j][1]
            j += 1
        if begin < end:
            found.append((begin, end))
    return found


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
