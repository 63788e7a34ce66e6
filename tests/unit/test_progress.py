"""Where a progress bar is drawn."""

from __future__ import annotations

import io
import os
import termios

from train.callbacks.progress import is_terminal


def test_a_bar_needs_a_terminal_with_columns() -> None:
    assert not is_terminal(io.StringIO())
    ends = os.openpty()
    with os.fdopen(ends[0]), os.fdopen(ends[1], "w") as console:
        assert not is_terminal(console), "as Open MPI gives its ranks one"
        termios.tcsetwinsize(console, (24, 80))
        assert is_terminal(console)
