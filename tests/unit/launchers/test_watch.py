"""`shardwright watch`: a run and a sweep that other processes run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardwright.launchers.sweep import directory
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.directory import PointState
from shardwright.launchers.watching import line
from shardwright.launchers.watching.line import Fact
from shardwright.launchers.watching.watch import Tail, sweep_is_over
from tests.e2e.terminal import Seen, see
from tests.unit.launchers.fakes import ROOT, Shardwright, make_shardwright
from tests.unit.launchers.run_directories import a_trained_run

shardwright = pytest.fixture(make_shardwright)

STEPS = 80
"""A tenth of a second each: who watches has to have started meanwhile."""
RUN = """
import json, sys, time
from pathlib import Path
from shardwright.train.run_directory import owner, stop_note

run_dir, steps, ends = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with owner.owned(run_dir, print):
    log = (run_dir / "logs" / "run.log").open("a")
    for step in range(1, steps + 1):
        at = {"step": step, "samples": step * 8, "tokens": step * 512, "time": time.time()}
        told = {"loss": 9 - step / 100, "tokens_per_second": 1234.5, "peak_memory_bytes": 2 * 10**9}
        with (run_dir / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({**at, **told, "mfu": 0.417}) + "\\n")
        print(f"logged {step}", file=log, flush=True)
        print(step, flush=True)
        time.sleep(0.1)
    print("the last line", file=log, flush=True)
    if ends == "done":
        (run_dir / "final").mkdir()
    else:
        stop_note.Stopped(steps, 1, "SIGTERM", 1.0, None, steps).write(run_dir)
"""


@contextmanager
def running(run_dir: Path, steps: int, ends: str = "done") -> Iterator[subprocess.Popen[str]]:
    """A process that does to a run's directory what a run does, and holds it as one does."""
    a_trained_run(run_dir, [1.0], is_done=False, trainer={"max_steps": steps})
    (run_dir / "metrics.jsonl").unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(run_dir), str(steps), ends],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def watched(tmp_path: Path, what: str, **options: object) -> Seen:
    return see(
        [sys.executable, "-m", "shardwright", "watch", what, "--interval", "0.1"],
        cwd=tmp_path,
        environment=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        **options,  # type: ignore[arg-type]
    )


def watched_by_several(
    tmp_path: Path, what: str, sizes: Sequence[tuple[int, int] | None]
) -> list[Seen]:
    """Return what those see who watch at the same time, each in a terminal of its own size."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda size: watched(tmp_path, what, size=size), sizes))


def text_of(seen: Seen) -> list[str]:
    """Return the lines that have a text: a screen has others where something was taken away."""
    return [text for text in seen.lines if text]


def test_a_run_is_watched_until_it_is_done(tmp_path: Path) -> None:
    sizes = ((80, 24), (160, 50), (30, 8))
    with running(tmp_path / "run", STEPS):
        every = watched_by_several(tmp_path, "run", sizes)
    for (columns, _), seen in zip(sizes, every, strict=True):
        assert seen.code == 0
        logged = [text for text in seen.lines if text.startswith("logged ")]
        expected = [f"logged {n}" for n in range(STEPS + 1 - len(logged), STEPS + 1)]
        assert logged == expected, "each once, in order"
        assert text_of(seen)[-2:] == ["the last line", f"{tmp_path / 'run'}: done"]
        drawn = re.findall(rf"[^\r\n\x1b]*step \d+/{STEPS}[^\r\n\x1b]*", seen.text)
        assert drawn
        assert max(map(len, drawn)) < columns
        if columns >= 80:
            assert "loss 8." in drawn[-1]
            assert "1,234 tokens/s  MFU 41.7%" in drawn[-1]
        if columns == 160:
            assert re.search(r"\d+% █+.*step .*MFU 41.7%  2.0 GB  \d+ s left", drawn[-1])


def test_ctrl_c_ends_the_watching_alone(tmp_path: Path) -> None:
    with running(tmp_path / "run", 3000) as process:
        seen = watched(tmp_path, "run", interrupt_at=r"step \d\d+/3000")
        assert process.poll() is None
    assert seen.code == 130
    assert text_of(seen)[-1] == f"no longer watched; {tmp_path / 'run'} goes on by itself"
    assert "Traceback" not in seen.text


@pytest.mark.parametrize("term", ["pipe", "dumb"])
def test_where_nothing_can_be_drawn_there_are_lines(tmp_path: Path, term: str) -> None:
    with running(tmp_path / "run", 30, "stopped"):
        seen = see(
            [sys.executable, "-m", "shardwright", "watch", "run", "--interval", "0.1"],
            cwd=tmp_path,
            environment=os.environ | {"PYTHONPATH": str(ROOT), "TERM": term},
            size=None if term == "pipe" else (80, 24),
        )
    assert seen.code == 75
    assert "\x1b" not in seen.text
    lines = [text for text in seen.lines if text]
    assert [text for text in lines if text.startswith("logged ")][-1] == "logged 30"
    assert sum(text.startswith("step ") for text in lines) <= 1, "its log says the rest"
    assert lines[-3:-1] == ["the last line", f"{tmp_path / 'run'}: stopped at step 30 by SIGTERM"]
    assert re.fullmatch(rf"  resume it with: .*shardwright.* resume {tmp_path}/run", lines[-1])


def test_a_sweep_is_watched_until_its_owner_has_ended(tmp_path: Path) -> None:
    points = tuple(directory.Point(n, {"seed": n}, (f"seed={n}",)) for n in range(3))
    sweep = directory.Sweep(tmp_path / "sweep", "lr", 0.0, SweepConfig(name="lr"), (), points)
    directory.write_plan(sweep)
    owner = """
import sys, time
from pathlib import Path
from shardwright.launchers.sweep import directory
from shardwright.launchers.sweep.directory import PointState
where = Path(sys.argv[1])
with directory.claimed(where):
    for number in range(3):
        directory.write_state(where, PointState(number, "running", 1, where="cpu 0"))
        print(flush=True)
        time.sleep(1)
        ends = "failed" if number == 1 else "done"
        directory.write_state(where, PointState(number, ends, 1, 1, why="it was a test"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", owner, str(sweep.directory)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    drawn, told = watched_by_several(tmp_path, "sweep", ((80, 24), None))
    process.communicate()
    assert process.returncode == 0
    for seen in (drawn, told):
        assert seen.code == 1
        assert f"{sweep.directory}: 2 done, 1 failed" in seen.lines
    assert "point 1  seed=1: failed: it was a test" in told.lines
    head = next(text for text in drawn.lines if text.startswith("lr: 3 points"))
    assert head.startswith("lr: 3 points, 2 done, 1 failed")
    assert len([text for text in drawn.lines if text.startswith("lr: ")]) == 1, "in place"
    assert any(text.split() == ["1", "seed=1", "-", "failed:"] for text in drawn.lines) or (
        "failed: it was a test" in drawn.text
    )


@pytest.mark.parametrize(
    ("states", "is_alive", "was_here", "heard", "is_over"),
    [
        (["done", "running"], True, False, False, False),
        (["done", "running"], False, True, False, True),
        (["done", "running"], False, True, True, False),
        (["done", "running"], False, False, False, False),
        (["done", "failed"], False, False, False, True),
    ],
)
def test_when_a_sweep_is_over(
    states: list[directory.State], is_alive: bool, was_here: bool, heard: bool, is_over: bool
) -> None:
    found = [PointState(n, state) for n, state in enumerate(states)]
    assert sweep_is_over(found, is_alive=is_alive, was_here=was_here, heard=heard) == is_over


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "none is not a run directory: cannot read "),
        (["runs"], "runs holds 2 runs that are no sweep of `shardwright sweep`; watch one of them"),
        (["runs/a", "--interval", "0"], "--interval 0 must be at least 0.1"),
    ],
)
def test_bad_input(
    shardwright: Shardwright, tmp_path: Path, words: list[str], message: str
) -> None:
    for name in "ab":
        a_trained_run(tmp_path / "runs" / name, [1.0])
    outcome = shardwright("watch", *words)
    assert outcome.code == 2
    assert message in outcome.err


def test_a_run_that_is_over_is_told_at_once(shardwright: Shardwright, tmp_path: Path) -> None:
    a_trained_run(tmp_path / "run", [1.0])
    outcome = shardwright("watch", "run")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'run'}: done\n")


# --- the line -------------------------------------------------------------------------------------

LAST = {
    **{"step": 266, "loss": 3.12341, "eval_loss": 3.5, "tokens_per_second": 12345.6},
    **{"mfu": 0.4123, "peak_memory_bytes": 12_300_000_000},
}
WHOLE = (
    "step 266/720  loss 3.1234  held-out loss 3.5000  12,346 tokens/s  MFU 41.2%  12.3 GB  "
    "8 min left"
)


def test_the_facts_of_a_line() -> None:
    found = line.facts(LAST, 720, 500.0, None)
    assert line.fitted(found, 200) == WHOLE
    assert line.drawn(found, 266 / 720, 200) == f" 37% {line.bar(266 / 720, 30)}  {WHOLE}"
    assert line.drawn(found, 266 / 720, len(WHOLE) + 10) == WHOLE, "no room for a bar"
    assert line.fitted(found, 64) == "step 266/720  loss 3.1234  12,346 tokens/s  8 min left"
    assert line.fitted(found, 13) == "step 266/720"
    assert line.fitted(found, 6) == "step …"
    silent = line.facts({"step": 3}, None, None, 300.0)
    assert line.fitted(silent, 80) == "step 3  silent for 5 min"
    assert line.fitted([Fact("preparing data", 0)], 80) == "preparing data"


def test_what_collectives_send_is_the_first_to_go() -> None:
    found = line.facts({**LAST, "sent_bytes_per_second": 1.25e9}, 720, 500.0, None)
    assert line.fitted(found, 200) == WHOLE.replace("41.2%", "41.2%  1.2 GB/s sent")
    assert line.fitted(found, len(WHOLE) + 5) == WHOLE


@pytest.mark.parametrize(("share", "text"), [(0, "····"), (0.5, "██··"), (1, "████"), (9, "████")])
def test_a_bar(share: float, text: str) -> None:
    assert line.bar(share, 4) == text
    assert line.bar(0.3, 4) == "█▎··"


def test_a_run_is_silent_when_its_next_line_is_overdue() -> None:
    often, rarely = [0.0, 1.0, 2.0, 3.0], [0.0, 600.0, 1200.0]
    assert line.silent_seconds(often, 100.0) is None
    assert line.silent_seconds(often, 203.0) == 200.0
    assert line.silent_seconds(rarely, 2400.0) is None
    assert line.silent_seconds(rarely, 4000.0) == 2800.0
    assert line.silent_seconds([], 1e9) is None


def test_the_tail_of_a_log_that_grows_is_cut_or_is_another(tmp_path: Path) -> None:
    one, other = tmp_path / "run.log", tmp_path / "job-7.log"
    shown: list[Path | None] = [None]
    tail = Tail(lambda: shown[0], 2)
    assert tail.lines() == []
    one.write_text("1\n2\n3\nhal")
    shown[0] = one
    assert tail.lines() == ["2", "3"]
    with one.open("a") as file:
        file.write("f\nlast\n")
    assert tail.lines() == ["half", "last"]
    one.write_text("new\n")
    assert tail.lines() == ["new"]
    other.write_text("a\nb\nc\n")
    shown[0] = other
    assert tail.lines() == ["a", "b", "c"]
    other.unlink()
    assert tail.lines() == []
