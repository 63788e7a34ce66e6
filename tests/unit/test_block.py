"""Lines that are drawn again in place, and texts of wide characters."""

from __future__ import annotations

import pytest

from shardwright.train.console import cells
from shardwright.train.console.block import Block
from tests.screens import screen


def test_lines_are_drawn_in_place_below_what_is_printed() -> None:
    with screen(20, 10) as seen:
        copied: list[str] = []
        seen.console.copies.append(copied.append)
        block = Block(seen.console)
        block.show(["one", "two"])
        block.write("said first")
        block.show(["three", "four", "five"])
        block.write("said\nlater")
        block.show(["six"])
        assert seen.lines == ["said first", "said", "later", "six"]
        block.show(["seven", "eight"])
        block.close()
        print("after", file=seen.console)
        assert seen.lines == ["said first", "said", "later", "seven", "eight", "after"]
        assert copied == ["said first", "said", "later", "after"]


def test_there_are_never_more_lines_than_the_window_has() -> None:
    with screen(10, 4) as seen:
        block = Block(seen.console)
        for round_ in range(3):
            block.show([f"{round_} {number} " + "x" * 30 for number in range(9)])
        assert seen.lines == ["2 0 xxxx…", "2 1 xxxx…", "2 2 xxxx…"]
        assert seen.history == []
        block.close(keeps=False)
        assert seen.lines == [""]


def test_a_window_that_became_narrower_has_wrapped_the_lines() -> None:
    with screen(40, 10) as seen:
        block = Block(seen.console)
        block.show(["a" * 38, "b" * 38, "short"])
        seen.raw()
        seen.resize(20, 10)
        block.show(["new"])
        assert seen.raw().startswith(b"\r\x1b[4Anew"), "five rows, the cursor in the last"
        block.show(["new"])
        assert seen.raw().startswith(b"\rnew")


def test_control_characters_of_others_do_not_move_the_cursor() -> None:
    with screen(30, 5) as seen:
        block = Block(seen.console)
        block.show(["a\rb\x1b[2Jc\td"])
        assert seen.lines == ["a b [2Jc d"]


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("実験の記録", 6, "実験…"), ("é" * 3, 3, "é" * 3)],
)
def test_texts_are_cut_by_what_they_take_on_the_screen(
    text: str, columns: int, expected: str
) -> None:
    assert cells.cut(text, columns) == expected
    assert cells.width(expected) <= columns
    assert cells.cut("実験の記録", 6, keeps_end=True) == "…記録"
    assert cells.padded("実験", 6) == "実験  "
