"""Output that is closed or knows ASCII only ends no work, and a short command ends quietly."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardwright.train.console.terminal import READER_GONE, Terminal, is_read

ROOT = Path(__file__).resolve().parents[2]
WORK = """
import sys
from pathlib import Path
from shardwright.train.console import terminal

def work():
    terminal.outlive()
    with terminal.kept_in(Path("shown")):
        for word in ("one", "tw\\u00f6", "three"):
            print(word, flush=True)
            print(word, file=sys.stderr)
    Path("done").touch()
    return 0

sys.exit(terminal.run(work))
"""


def run(
    cwd: Path, *arguments: str, stdout: int | None, encoding: str = "utf-8", closed: bool = False
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: os.close(1)) if closed else None,
        timeout=60,
    )


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def hung_up() -> Iterator[int]:
    """A terminal that somebody has closed."""
    outside, inside = os.openpty()
    os.close(outside)
    yield inside
    os.close(inside)


@pytest.fixture
def full() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("output", ["unread", "hung_up", "full"])
def test_work_goes_on_with_its_log_alone(
    output: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ended = run(tmp_path, "-c", WORK, stdout=request.getfixturevalue(output))
    assert (ended.returncode, ended.stderr) == (0, "one\ntwö\nthree\n")
    assert (tmp_path / "done").exists()
    assert (tmp_path / "shown").read_text() == "one\none\ntwö\ntwö\nthree\nthree\n"


def test_a_letter_that_the_output_does_not_know_is_escaped(tmp_path: Path) -> None:
    ended = run(tmp_path, "-c", WORK, stdout=subprocess.PIPE, encoding="ascii")
    assert ended.returncode == 0
    assert ended.stdout == "one\ntw\\xf6\nthree\n"
    assert "twö" in (tmp_path / "shown").read_text()


def test_no_file_and_no_child_gets_the_place_of_a_closed_output(tmp_path: Path) -> None:
    look = """
import os, subprocess, sys
from pathlib import Path
from shardwright.train.console import terminal

def look():
    file = os.open("opened", os.O_WRONLY | os.O_CREAT)
    print("lost", flush=True)
    return file if subprocess.run(["sh", "-c", "echo lost"]).returncode == 0 else 99

sys.exit(terminal.run(look))
"""
    ended = run(tmp_path, "-c", look, stdout=None, closed=True)
    assert ended.returncode > 2, ended.stderr
    assert (tmp_path / "opened").read_bytes() == b""


@pytest.mark.parametrize("arguments", [["--help"], ["status", "all"], ["train", "--cfg", "job"]])
def test_a_short_command_ends_quietly_when_nobody_reads_it(
    arguments: list[str], tmp_path: Path, unread: int
) -> None:
    ended = run(tmp_path, "-m", "shardwright", *arguments, stdout=unread)
    assert (ended.returncode, ended.stderr) == (READER_GONE, "")


def test_it_is_known_whether_somebody_reads(unread: int, hung_up: int, full: int) -> None:
    assert not is_read(unread)
    assert not is_read(hung_up)
    assert is_read(full)
    reader, writer = os.pipe()
    assert is_read(writer)
    os.close(reader)
    assert not is_read(writer)
    os.close(writer)


def test_a_message_that_nobody_reads_keeps_its_exit_code(tmp_path: Path, unread: int) -> None:
    """`shardwright ... 2>&1 | head -0`."""
    ended = subprocess.run(
        [sys.executable, "-m", "shardwright", "trian"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=unread,
        stderr=unread,
    )
    assert ended.returncode == 2


def test_a_full_disk_is_an_error_to_who_only_writes_there(tmp_path: Path, full: int) -> None:
    ended = run(tmp_path, "-m", "shardwright", "--help", stdout=full)
    assert ended.returncode == 1
    assert "No space left on device" in ended.stderr


def test_an_output_that_does_not_wait_loses_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    many = 'import shardwright.train.console.terminal as t; t.outlive(); print("x" * 300_000)'
    child = subprocess.Popen(
        [sys.executable, "-c", many], stdout=writer, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert len(file.read()) == 300_001
    assert child.wait() == 0


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        (("a line\n", "and ", "another\n"), ["a line", "and another"]),
        (("\r 10%|#", "\r 90%|###", "\r     \r", "a line", "\n", "\r100%\n"), ["a line", "100%"]),
    ],
)
def test_copies_get_what_a_terminal_shows_in_the_end(
    texts: tuple[str, ...], lines: list[str], tmp_path: Path
) -> None:
    copies: list[str] = []
    add: Callable[[str], None] = copies.append
    with (tmp_path / "out").open("w") as file:
        terminal = Terminal(file.fileno(), "utf-8")
        terminal.copies.append(add)
        for text in texts:
            terminal.write(text)
        terminal.flush()
    assert copies == lines
