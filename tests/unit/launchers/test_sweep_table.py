"""What a sweep shows of its points: a table in place, or lines."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from shardwright.launchers.sweep import table
from shardwright.launchers.sweep.definition import Objective, SweepConfig
from shardwright.launchers.sweep.directory import Point, PointState, Sweep
from shardwright.launchers.sweep.table import Progress, Table
from tests.screens import screen


def a_sweep(points: int, directory: Path = Path("/w/sweeps/lr")) -> Sweep:
    definition = SweepConfig(name="lr", objectives=(Objective(metric="eval_loss"),))
    found = tuple(
        Point(n, {"trainer.learning_rate": n / 1e4}, (f"trainer.learning_rate={n / 1e4:g}",))
        for n in range(points)
    )
    return Sweep(directory, "lr", 0.0, definition, (), found)


STATES = [
    PointState(0, "done", 1, values={"eval_loss": 3.25}, started=0.0, ended=50.0),
    PointState(1, "failed", 2, why="rank 0 failed\nbecause", started=0.0, ended=60.0),
    PointState(2, "running", 1, where="cpu 0", started=50.0),
    PointState(3),
]
FAR = {2: Progress(120, 720, 4.5, 1234.5, 600.0)}


def test_a_table_of_points() -> None:
    assert table.lines(a_sweep(4), STATES, FAR, 120, 20, 120.0) == [
        "lr: 4 points, 1 waiting, 1 running, 1 done, 1 failed, 2 min since the first began",
        "point  settings                         step    loss  tokens/s    left  eval_loss  state",
        "    0  trainer.learning_rate=0             -       -         -       -       3.25  done",
        "    1  trainer.learning_rate=0.0001        -       -         -       -          -  "
        "failed: rank 0 failed",
        "    2  trainer.learning_rate=0.0002  120/720  4.5000     1,234  10 min          -  "
        "running on cpu 0",
        "    3  trainer.learning_rate=0.0003        -       -         -       -          -  "
        "waiting",
    ]


@pytest.mark.parametrize(("width", "rows"), [(120, 20), (79, 23), (40, 8), (20, 4), (79, 2)])
def test_it_fits_the_window_and_sums_up_the_rest(width: int, rows: int) -> None:
    sweep = a_sweep(40)
    states = [*STATES, *(PointState(n) for n in range(4, 40))]
    lines = table.lines(sweep, states, FAR, width, rows, 120.0)
    assert len(lines) <= rows
    if rows < 4:
        return
    assert any(line.lstrip().startswith("2  ") for line in lines), "what runs is shown first"
    if width >= 40:
        assert max(map(len, lines[1:])) <= width
        assert "rate=0.0002" in "".join(lines), "its value tells a point from others"
    left = 40 - (rows - 3)
    assert lines[-1].startswith(f"… and {left} more points: {left} waiting") == (rows > 6)


def test_in_a_terminal_it_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "DRAWN_SECONDS", 0.0)
    with screen(80, 24) as seen:
        shown = Table(seen.console)
        assert shown.is_drawn
        shown.update(a_sweep(4), [PointState(n) for n in range(4)])
        shown.say("point 0 is started")
        shown.update(a_sweep(4), STATES)
        shown.close()
        first, head, _names, *rows = seen.lines
        assert first == "point 0 is started"
        assert head.startswith("lr: 4 points, 1 waiting, 1 running, 1 done, 1 failed, ")
        assert len(rows) == 4
        assert "failed: rank 0 failed" in rows[1]


def test_where_it_is_no_terminal_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    shown = Table(out)
    shown.update(a_sweep(4), STATES)
    shown.say("point 2 is started")
    assert out.getvalue() == "point 2 is started\n", "the sweep itself tells what changes"
    monkeypatch.setattr(table, "LIFE_SECONDS", 0.0)
    shown.update(a_sweep(4), STATES)
    assert out.getvalue().splitlines()[1:] == [
        "lr: 1 waiting, 1 running, 1 done, 1 failed; point 2 at step -"
    ]
    monkeypatch.setenv("TERM", "dumb")
    with screen() as seen:
        assert not Table(seen.console).is_drawn


def test_who_watches_from_elsewhere_is_told_what_changes() -> None:
    out = io.StringIO()
    shown = Table(out, tells_changes=True)
    for _ in range(2):
        shown.update(a_sweep(4), STATES)
    assert out.getvalue().splitlines() == [
        "point 0  trainer.learning_rate=0: done, eval_loss 3.25",
        "point 1  trainer.learning_rate=0.0001: failed: rank 0 failed",
        "point 2  trainer.learning_rate=0.0002: running on cpu 0",
    ]
