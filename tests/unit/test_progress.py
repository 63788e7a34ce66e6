"""What is shown of work that takes a while: bars in a terminal, lines behind a pipe."""

from __future__ import annotations

import io
import logging
import os
import re
import select
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest

from shardwright.train.console import progress
from shardwright.train.console.progress import is_terminal

LIFE_SECONDS = 0.2
"""Instead of nine seconds."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LIFE_SECONDS", LIFE_SECONDS)
    monkeypatch.setattr(progress, "BRIEF_SECONDS", 0.1)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.01)


@pytest.fixture
def console(quick: None) -> Iterator[io.StringIO]:
    text = io.StringIO()
    with progress.shown_on(text):
        yield text
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(console: io.StringIO) -> list[str]:
    return console.getvalue().splitlines()


def test_a_bar_needs_a_terminal_with_columns() -> None:
    assert not is_terminal(io.StringIO())
    ends = os.openpty()
    with os.fdopen(ends[0]), os.fdopen(ends[1], "w") as console:
        assert not is_terminal(console), "as Open MPI gives its ranks one"
        termios.tcsetwinsize(console, (24, 80))
        assert is_terminal(console)


def test_nothing_is_shown_unless_a_place_was_given(quick: None) -> None:
    with progress.phase("silent") as shown:
        shown.advance()
        assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    progress.write("a line")
    assert list(progress.over([1, 2], "silent")) == [1, 2]


def test_behind_a_pipe_a_phase_is_named_at_once_and_then_shows_signs_of_life(
    console: io.StringIO,
) -> None:
    with progress.phase("training the tokenizer"):
        assert lines(console) == ["training the tokenizer"]
        wait_until(lambda: len(lines(console)) == 3)
    assert all(re.fullmatch(r"training the tokenizer: \d+ s", x) for x in lines(console)[1:])


def test_signs_of_life_do_not_come_more_often(console: io.StringIO) -> None:
    began = time.monotonic()
    with progress.phase("tokenising", unit="character") as shown:
        while time.monotonic() - began < 5 * LIFE_SECONDS:
            shown.advance(1_000_000)
            time.sleep(0.001)
    most = 1 + (time.monotonic() - began) / LIFE_SECONDS
    assert 1 < len(lines(console)) <= most
    assert re.fullmatch(r"tokenising: [\d.,]+ million characters, .* a second", lines(console)[-1])


def test_the_rate_and_the_time_left_are_told_where_the_total_is_known(
    console: io.StringIO,
) -> None:
    shown = progress.begin("evaluating", total=400, unit="batch")
    shown._began -= 50.0
    shown.at(100)
    assert shown.line() == "evaluating: 100 of 400 batches, 2.0 a second, 2 min left"
    shown.end()
    shown = progress.begin("training", total=1000, unit="step", starts_at=900)
    shown.note = "the first step"
    shown._began -= 30.0
    assert shown.line() == "training: the first step, 900 of 1,000 steps, 30 s"
    shown.at(910, "")
    assert shown.line() == "training: 910 of 1,000 steps, 3.0 s a step, 4 min left", "of this start"
    shown.end()
    shown = progress.begin("writing", total=2_000_000, unit="B")
    shown._began -= 10.0
    shown.at(500_000)
    assert shown.line() == "writing: 500 kB of 2.0 MB, 50.0 kB/s, 30 s left"
    shown.end()


def test_only_the_innermost_phase_shows_life(console: io.StringIO) -> None:
    with progress.phase("outside", shows_start=False):
        with progress.phase("inside"):
            wait_until(lambda: len(lines(console)) == 3)
        assert all(line.startswith("inside") for line in lines(console))
        wait_until(lambda: len(lines(console)) == 4)
        progress.now("elsewhere")
        wait_until(lambda: "outside: elsewhere, 0 s" in lines(console) or len(lines(console)) > 9)
    assert all(line.startswith("outside: ") for line in lines(console)[3:])


def test_what_is_brief_is_not_shown_and_what_comes_again_not_each_time(
    console: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(20):
        with progress.phase(f"evaluating step {step}", kind="evaluating", comes_again=True):
            pass
    assert lines(console) == []
    monkeypatch.setattr(progress, "LIFE_SECONDS", 1000.0)
    monkeypatch.setattr(progress, "BRIEF_SECONDS", 0.0)
    for step in range(3):
        with progress.phase(f"evaluating step {step}", kind="evaluating", comes_again=True):
            time.sleep(0.05)
    assert lines(console) == ["evaluating step 0"]


def test_an_exception_ends_all_phases(quick: None) -> None:
    console = io.StringIO()

    def start() -> None:
        with progress.shown_on(console):
            progress.begin("a start that fails")
            raise KeyError

    with pytest.raises(KeyError):
        start()
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    progress.write("afterwards")
    assert lines(console) == ["a start that fails"]


class Screen:
    """The other side of a terminal of 80 columns."""

    def __init__(self) -> None:
        self.reading, writing = os.openpty()
        termios.tcsetwinsize(writing, (24, 80))
        self.console = os.fdopen(writing, "w")
        self.text = ""

    def read(self) -> str:
        while select.select([self.reading], [], [], 0)[0]:
            self.text += os.read(self.reading, 4096).decode()
        return self.text

    def close(self) -> None:
        self.console.close()
        os.close(self.reading)


def test_in_a_terminal_bars_are_drawn_and_clocks_go_on(quick: None) -> None:
    screen = Screen()
    with progress.shown_on(screen.console):
        training = progress.begin("training", total=30, unit="step", leave=True, has_bar_name=False)
        training.at(3, "loss 1.2345  12,345 tokens/s")
        with progress.phase("evaluating step 3", total=8, unit="batch") as shown:
            shown.advance(2)
            wait_until(lambda: "evaluating step 3:  25%" in screen.read())
            wait_until(lambda: "[00:01" in screen.read())
            progress.write("a line above the bars", screen.console)
        training.end()
    drawn = re.split(r"[\r\n]+|\x1b\[A", screen.read())
    assert any("10%" in x and "3/30" in x and "loss 1.2345" in x for x in drawn)
    assert "a line above the bars" in [x.strip() for x in drawn]
    assert max(map(len, drawn)) <= 80
    left = [x for x in drawn if x.strip()][-1]
    assert "3/30" in left, "the bar of the training stays, that of the evaluation is gone"
    screen.close()


def test_counts_have_room_in_80_columns_and_are_whole_behind_a_pipe(quick: None) -> None:
    screen = Screen()
    with (
        progress.shown_on(screen.console),
        progress.phase("tokenising", unit="B", total=96.6e6) as shown,
    ):
        shown.at(83.5e6, counts={"documents": 69_144, "tokens": 27_161_005})
        wait_until(lambda: "69.1k documents, 27.2M" in screen.read())
        drawn = re.split(r"[\r\n]+|\x1b\[A", screen.read())
        assert any(re.search(r"86%\|.*83\.5M/96\.6M \[\d+:\d+ left, ", line) for line in drawn)
        assert max(map(len, drawn)) <= 80
        assert "69,144 documents, 27,161,005 tokens, 83.5 MB of 96.6 MB" in shown.line()
        shown.counts = {"documents": 7}
        wait_until(lambda: ", 7 documents]" in screen.read())
    screen.close()


def test_how_far_a_phase_is_can_be_told_elsewhere(quick: None) -> None:
    """When it begins, now and then, and when it has ended; nothing is shown here."""
    told: list[tuple[str, float, float, bool]] = []

    def hear(phase: progress.Phase) -> None:
        told.append((phase.name, phase.done, phase.starts_at, phase.is_over))

    with progress.shown_on(None, told=hear), progress.phase("outer"):
        with progress.phase("inner", total=9) as shown:
            assert told[:2] == [("outer", 0, 0, False), ("inner", 0, 0, False)]
            shown.skip(3)
            wait_until(lambda: ("inner", 3, 3, False) in told)
            shown.at(7)
        assert told[-1] == ("inner", 7, 3, True)
        with progress.phase("brief", comes_again=True):
            pass
    assert told[-1] == ("outer", 0, 0, True)
    assert not [each for each in told if each[0] == "brief"]


def test_what_is_said_while_a_bar_is_drawn_has_a_line_of_its_own(quick: None) -> None:
    ends = os.openpty()
    termios.tcsetwinsize(ends[1], (24, 80))
    with os.fdopen(ends[0]), os.fdopen(ends[1], "w") as console:
        logger = logging.Logger("said")
        logger.addHandler(progress.LogLines(console))
        with progress.shown_on(console), progress.phase("starting", leave=True) as outer:
            outer.at(0, "importing libraries")
            with progress.phase("reading", unit="character"):
                wait_until(lambda: select.select([ends[0]], [], [], 0)[0] != [])
                logger.warning("a document is cut")
                progress.write("12 parameters", console)
        assert outer.is_drawn
        screen = pyte.Screen(80, 24)
        stream = pyte.ByteStream(screen)
        while select.select([ends[0]], [], [], 0)[0]:
            stream.feed(os.read(ends[0], 2**16))
    said, told, bar, *rest = (line.rstrip() for line in screen.display)
    assert (said, told) == ("a document is cut", "12 parameters")
    assert bar.startswith("starting [00:0")
    assert bar.endswith("importing libraries")
    assert not any(rest)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("zero2 on 2 ranks: fp32 compute", ["zero2 on 2 ranks: fp32 compute"]),
        (
            "zero2 on 2 ranks: fp32 compute, fp32 reduction",
            ["zero2 on 2 ranks: fp32 compute,", "    fp32 reduction"],
        ),
        ("resume it: shardwright resume /tmp/run", ["resume it: shardwright resume /tmp/run"]),
    ],
)
def test_a_line_that_is_too_wide_is_broken_between_words_unless_it_is_to_be_copied(
    line: str, shown: list[str]
) -> None:
    assert progress.wrapped(line, 32).split("\n") == shown


def test_who_looks_from_elsewhere_reads_how_far_the_innermost_is(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "NOTED_SECONDS", 0.02)
    path = tmp_path / "progress.txt"

    def noted() -> str:
        return path.read_text() if path.exists() else ""

    with progress.shown_on(io.StringIO(), path), progress.phase("preparing"):
        wait_until(lambda: noted().startswith("preparing: "))
        with progress.phase("tokenising", unit="B", total=4e6) as shown:
            shown.skip(1e6)
            shown.at(2e6, "7 documents, 9 tokens")
            wait_until(lambda: "2.0 MB of 4.0 MB" in noted())
        line = r"tokenising: 7 documents, 9 tokens, 2.0 MB of 4.0 MB, [\d.]+ .?B/s, .* left"
        assert re.fullmatch(line, noted()), noted()
        wait_until(lambda: noted().startswith("preparing: "))
    assert not path.exists()
