"""What is decided of points: which to start, how one has ended, what is said at the end. Pure."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers.sweep.definition import Objective
from shardwright.launchers.sweep.directory import Point, PointState, State, Sweep
from shardwright.train import program
from shardwright.train.errors import FAILED, INTERRUPTED, RESUMABLE
from shardwright.train.units import duration

MOST_ROWS = 30
"""Of a table of points; of more, the best are shown."""
MOST_FAILURES = 10
"""Told one by one at the end of a sweep."""


def to_start(
    states: Sequence[PointState], max_retries: int, *, retries_all: bool = False
) -> list[int]:
    """Return the numbers of points to start: cut ones first, then new ones, then failed ones."""
    order: dict[State, int] = {"running": 0, "stopped": 1, "waiting": 2, "failed": 3}
    wanted = [
        state
        for state in states
        if state.state in order
        and (state.state != "failed" or retries_all or state.failures <= max_retries)
    ]
    return [s.number for s in sorted(wanted, key=lambda s: (order[s.state], s.number))]


def state_after(code: int, *, is_done: bool, was_stopped: bool, is_pruned: bool) -> State:
    """Return what has become of a point whose start ended with a code.

    ``was_stopped``: the sweep had told it to end. A signal that reached it before it could listen
    kills it, and nothing was wrong with it.
    """
    if code == 0 and is_done:
        return "done"
    by_signal = code < 0 or code > 128
    if is_pruned and (code in (0, RESUMABLE, INTERRUPTED) or by_signal):
        return "pruned"
    if code in (0, RESUMABLE) or (was_stopped and by_signal):
        return "stopped"
    return "failed"


def exit_code(states: Iterable[PointState], *, was_stopped: bool) -> int:
    """Return the exit code of a sweep."""
    found = {state.state for state in states}
    if was_stopped and found - {"done", "pruned", "failed"}:
        return RESUMABLE
    if "failed" in found:
        return FAILED
    return RESUMABLE if found & {"stopped"} else 0


def counts(states: Iterable[PointState]) -> str:
    """Return how many points are in which state, in words."""
    names: dict[State, str] = {
        "done": "done",
        "pruned": "pruned",
        "running": "running",
        "failed": "failed",
        "stopped": "stopped",
        "waiting": "not started",
    }
    by_state = [state.state for state in states]
    said = [f"{by_state.count(s)} {name}" for s, name in names.items() if s in by_state]
    return ", ".join(said) or "no points"


def values(lines: Iterable[Mapping[str, Any]], objectives: Sequence[Objective]) -> dict[str, float]:
    """Return the value that a run has logged last of each objective, given its metrics."""
    found: dict[str, float] = {}
    for line in lines:
        for each in objectives:
            value = line.get(each.metric)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[each.metric] = float(value)
    return found


def ranked(sweep: Sweep, states: Sequence[PointState]) -> list[tuple[Point, PointState]]:
    """Return the points, the best by the first objective first, those without a value last."""
    first = sweep.objectives[0]
    sign = 1 if first.direction == "minimize" else -1

    def key(pair: tuple[Point, PointState]) -> tuple[bool, float, int]:
        value = pair[1].values.get(first.metric)
        return (value is None, sign * (value or 0.0), pair[0].number)

    return sorted(zip(sweep.points, states, strict=True), key=key)


# --- what is said ---------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """Return a setting or a value for a cell."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(
    sweep: Sweep,
    rows: Sequence[tuple[Point, PointState]],
    width: int | None,
    *,
    with_values: bool = True,
    most: int = MOST_ROWS,
) -> str:
    """Return points as a table: number, state, what is varied and, unless there is none, values."""
    keys = list(dict.fromkeys(key for point, _ in rows for key in point.settings))
    metrics = [each.metric for each in sweep.objectives] if with_values else []
    cells = [["point", "state", *map(_leaf_of(keys), keys), *metrics]]
    for point, state in rows[:most]:
        cells.append(
            [
                str(point.number),
                "not started" if state.state == "waiting" else state.state,
                *(shown(point.settings.get(key, "")) for key in keys),
                *(shown(state.values.get(metric, "")) for metric in metrics),
            ]
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    if len(rows) > most:
        lines.append(f"... and {len(rows) - most} more")
    if width is not None:
        lines = [line if len(line) <= width else line[: width - 3] + "..." for line in lines]
    return "\n".join(lines)


def _leaf_of(keys: Sequence[str]) -> Any:
    """Return what shortens a key to its last part where no other key ends in the same."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return lambda key: leaf if leaves.count(leaf := key.rpartition(".")[2]) == 1 else key


def ended(
    point: Point, state: PointState, seconds: float | None, *, alike: int | None = None
) -> str:
    """Return the line for a point whose start has ended.

    ``alike`` is another point that has failed for the same reason.
    """
    took = f" after {duration(seconds)}" if seconds is not None else ""
    reached = "".join(f", {name} {shown(value)}" for name, value in state.values.items())
    why = f": {state.why.splitlines()[0]}" if state.why and state.state != "done" else ""
    if state.state == "failed" and alike is not None:
        why = f", as point {alike} did"
    return f"point {point.number}  {point.label}: {state.state}{took}{reached}{why}"


def summary(sweep: Sweep, states: Sequence[PointState], width: int | None) -> str:
    """Return what is said at the end of a sweep; a reason that many failed for, once."""
    parts = [table(sweep, ranked(sweep, states), width)]
    parts.append(f"{sweep.directory}: {counts(states)}")
    by_reason: dict[str, list[Point]] = {}
    for state in states:
        if state.state == "failed":
            why = state.why or f"exit code {state.code}"
            by_reason.setdefault(why, []).append(sweep.points[state.number])
    for why, points in list(by_reason.items())[:MOST_FAILURES]:
        first = points[0]
        numbers = ", ".join(str(point.number) for point in points)
        named = f"point {first.number} failed  {first.label}"
        lines = [
            named if len(points) == 1 else f"points {numbers} failed for the same reason",
            *(f"    {line}" for line in why.splitlines()),
            f"  log: {sweep.log(first.number)}",
        ]
        parts.append("\n".join(lines))
    if len(by_reason) > MOST_FAILURES:
        parts.append(f"... and for {len(by_reason) - MOST_FAILURES} more reasons")
    return "\n".join(parts)


def how_to_continue(sweep: Sweep, states: Sequence[PointState], max_retries: int) -> str | None:
    """Return the command that continues a sweep; None where nothing is left to run."""
    command = program.command("sweep", str(sweep.directory))
    if any(state.state in ("waiting", "running", "stopped") for state in states):
        return f"continue with: {command}"
    failed = [state for state in states if state.state == "failed"]
    if any(state.failures <= max_retries for state in failed):
        return f"try what failed again with: {command}"
    if failed:
        return f"try what failed again, sweep.max_retries or not: {command} --retry-failed"
    return None


def best_command(sweep: Sweep, states: Sequence[PointState]) -> str | None:
    """Return the command of a run with the best point's settings; None where none has a value."""
    found = ranked(sweep, states)
    if not found or sweep.objectives[0].metric not in found[0][1].values:
        return None
    point, _ = found[0]
    words = [*sweep.common(point), *point.overrides]
    return f"train the best one again with: {program.command('train', *words)}"


def differences(
    before: Sweep, arguments: Sequence[str], wanted: Sequence[Point] | None
) -> list[str]:
    """Return in what a sweep that is asked for is another than the one in a directory.

    ``wanted`` are its points, None where a search finds them.
    """
    found = []
    old = [a for a in before.arguments if a not in arguments]
    new = [a for a in arguments if a not in before.arguments]
    if old or new:
        was = " ".join(map(shlex.quote, old)) or "nothing"
        now = " ".join(map(shlex.quote, new)) or "nothing"
        found.append(f"all its points have {was} where {now} is asked for")
    if wanted is None:
        return found
    keys_before = sorted({key for point in before.points for key in point.settings})
    keys = sorted({key for point in wanted for key in point.settings})
    if keys_before != keys:
        found.append(f"it varies {', '.join(keys_before)}, and this one {', '.join(keys)}")
    elif missing := [p for p in before.points if not any(p.settings == w.settings for w in wanted)]:
        labels = "; ".join(f"{p.number} ({p.label})" for p in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        found.append(f"its points {labels}{more} are not among those asked for")
    return found


def another_sweep(directory: Path, found: Sequence[str]) -> str:
    """Return what is said where a directory is that of another sweep."""
    return (
        f"sweep_dir={directory} is that of another sweep: {'; '.join(found)}; give another "
        f"sweep_dir, or continue that one with `{program.command('sweep', str(directory))}`"
    )


def cleaned(state: PointState) -> PointState:
    """Return a state without what its last start has left."""
    return dataclasses.replace(state, code=None, why=None, ended=None, where=None)
