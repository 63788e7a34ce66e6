"""The parts of a trace's steps as a table to read. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from shardwright.train.loop.profiling.parts import PARTS, Called, Name, Step
from shardwright.train.units import size

_SAID: dict[Name, str] = {
    "compute": "compute",
    "communication": "communication, exposed",
    "copies": "copies, exposed",
    "data": "data",
    "host": "host",
}
_MOST_COLLECTIVES = 8
_WIDTH = 28


def table(title: str, steps: Sequence[Step], collectives: Sequence[Called], memory: str) -> str:
    """Return what is known of the steps of a trace, of a column each and their mean."""
    if not steps:
        return f"{title}\n\nno step was traced from its beginning to its end\n"
    shown = steps if len(steps) <= 4 else ()
    whole = statistics.fmean(step.seconds for step in steps)
    head = "".join(f"{f'step {step.number}':>12}" for step in shown)
    lines = [title, "", f"{'ms':<{_WIDTH}}{head}{'mean':>12}{'share':>9}"]
    for part in PARTS:
        of_each = [step.parts[part] for step in steps]
        if any(of_each) or part != "copies":
            lines.append(_row(_SAID[part], of_each, whole, len(shown)))
    lines.append(_row("step", [step.seconds for step in steps], whole, len(shown)))
    hidden = [step.hidden for step in steps]
    lines += ["", _row("communication, hidden", hidden, None, len(shown))]
    if collectives:
        lines += ["", f"{'collectives':<{_WIDTH + 12}}{'calls a step':>14}{'ms a step':>12}"]
        for each in collectives[:_MOST_COLLECTIVES]:
            name = f"{each.name[: _WIDTH + 11]:<{_WIDTH + 12}}"
            calls, milliseconds = each.calls / len(steps), 1e3 * each.seconds / len(steps)
            lines.append(f"{name}{calls:>14.1f}{milliseconds:>12.2f}")
    return "\n".join([*lines, "", memory, "", _EXPLAINED])


def said_of_memory(most_allocated: int | None, snapshot: str | None) -> str:
    """Return what a trace tells of memory, in a line."""
    text = "memory: "
    if most_allocated is not None:
        text += f"at most {size(most_allocated)} more than when the trace began"
    else:
        text += "the trace tells nothing of it"
    if snapshot is None:
        return f"{text};\nthere is no snapshot, which CUDA's allocator alone gives"
    return f"{text};\nsnapshot: {snapshot}, to be dropped on https://pytorch.org/memory_viz"


_EXPLAINED = """\
exposed: nothing else ran meanwhile.
hidden: beside compute, so that no time of the step is its own.
host: neither the device nor a collective had anything to do; on a CPU, Python.
"""


def _row(name: str, seconds: Sequence[float], whole: float | None, shown: int) -> str:
    mean = statistics.fmean(seconds)
    each = "".join(f"{1e3 * value:>12.2f}" for value in seconds[:shown])
    share = "" if not whole else f"{mean / whole:>9.1%}"
    return f"{name:<{_WIDTH}}{each}{1e3 * mean:>12.2f}{share}"
