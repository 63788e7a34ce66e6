"""A run that stands still says which rank it waits for, and ends to be resumed; real gloo ranks.

The default suite has one of the faults; `make test-faults` has all of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.commands import diagnose
from shardwright.launchers.ranks.processes import rank_processes
from shardwright.train.diagnosis import watcher
from shardwright.train.errors import RESUMABLE
from shardwright.train.run_directory import history
from shardwright.train.run_directory.failures import rank_failures
from tests.e2e import cli
from tests.faults import hanging
from tests.faults.hanging import Fault, run, wait_for_step
from tests.fixtures import TreeOf

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 4.0
HOST = socket.gethostname()


@pytest.fixture
def fresh(tiny_tree: TreeOf, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that gives a run that has not begun, by settings of its trainer."""

    def make(timeout: float | str = TIMEOUT_SECONDS, **trainer: Any) -> Path:
        tree = tiny_tree("clm")
        tree["trainer"] |= {"max_steps": 6, "save_every_steps": 3, "eval_every_steps": 4}
        tree["trainer"] |= {"hang_timeout_seconds": timeout, **trainer}
        tree["checkpoint"] = {"async": False}
        tree["launcher"]["grace_seconds"] = 1
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(json.dumps(tree))
        return run_dir

    return make


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(
            hanging.endless_loop_in_the_collator,
            r"Rank 1 on node \S+ never came: for \S+ s it has been waiting for data of step \d, at "
            r"faults/hanging.py:\d+ in loop\. "
            r"Rank 0 waits in all_reduce \(number \d+ of group 0, all_reduce of \d+, at "
            r"train/loop/ahead.py:\d+ in __init__\)\.",
            id="loop",
        ),
        pytest.param(
            hanging.different_collectives,
            r"The ranks are in different collectives: as number \d+ of group 0, rank 0 on node \S+ "
            r"calls broadcast, at faults/hanging.py:\d+ in differ, and rank 1 on node \S+ "
            r"calls all_reduce of 3, at faults/hanging.py:\d+ in differ\.",
            marks=pytest.mark.faults,
            id="different",
        ),
        pytest.param(
            hanging.killed_while_others_wait,
            r"Rank 1 on node \S+ is gone: process \d+ was starting\. "
            r"Rank 0 is starting.*, at train/process/meeting.py:\d+ in wait_for",
            marks=pytest.mark.faults,
            id="killed",
        ),
        pytest.param(
            hanging.slow_forward,
            r"Rank 1 on node \S+ never came: for \S+ s it has been in the forward or backward pass "
            r"of step \d, at faults/hanging.py:\d+ in _sleep_long",
            marks=pytest.mark.faults,
            id="forward",
        ),
        pytest.param(
            hanging.slow_data,
            r"Rank 1 on node \S+ never came: for \S+ s it has been waiting for data of step \d, at "
            r"faults/hanging.py:\d+ in _sleep_long",
            marks=pytest.mark.faults,
            id="data",
        ),
        pytest.param(
            hanging.slow_save,
            r"Rank 1 on node \S+ never came: for \S+ s it has been writing a checkpoint of step 3, "
            r"at faults/hanging.py:\d+ in _sleep_long",
            marks=pytest.mark.faults,
            id="save",
        ),
        pytest.param(
            hanging.slow_disk,
            r"Rank 1 on node \S+ never came: for \S+ s it has been writing a checkpoint of step 3, "
            r"at faults/hanging.py:\d+ in hook",
            marks=pytest.mark.faults,
            id="disk",
        ),
    ],
)
def test_the_verdict_names_rank_node_and_place(
    fault: Fault, said: str, fresh: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = fresh()
    ended = run(run_dir, fault)
    assert set(ended.exit_codes) <= {RESUMABLE, -signal.SIGKILL}
    assert_said(run_dir, said)
    assert f"{HOST}" in said_of(run_dir)
    # Told again by whoever asks, with what each rank has shown.
    assert diagnose.main([str(run_dir), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert re.match(said, told["verdict"])
    assert told["state"].startswith("failed: it hung, waiting for rank")
    assert no_watcher_is_left(run_dir)


@pytest.mark.faults
def test_a_stopped_rank_is_named_and_the_run_is_resumed(
    fresh: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = fresh(log_every_steps=1, max_steps=1000, save_every_steps=2, eval_every_steps=None)

    def stop(ranks: list[Any]) -> None:
        wait_for_step(run_dir, 4)
        assert diagnose.main([str(run_dir), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] is None
        assert len(watchers(run_dir)) == 1
        os.kill(ranks[1].pid, signal.SIGSTOP)
        time.sleep(1)  # until what is in flight is over: the time decides nothing
        assert diagnose.main([str(run_dir), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["culprits"] == [1]
        assert "is stopped by a signal (state T)" in told["verdict"]

    ended = run(run_dir, hanging.none, stop)
    assert ended.exit_codes == [RESUMABLE, -signal.SIGKILL]
    assert_said(run_dir, r"Rank 1 on node \S+ never came: .* is stopped by a signal \(state T\)")
    tree = json.loads((run_dir / "config.yaml").read_text())
    newest = max(int(path.name[11:]) for path in run_dir.glob("checkpoints/checkpoint-*"))
    tree["trainer"]["max_steps"] = newest + 1
    (run_dir / "config.yaml").write_text(json.dumps(tree))
    assert run(run_dir, hanging.none).exit_codes == [0, 0]
    assert rank_failures(run_dir) == []


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_torchrun_starts_a_run_that_hung_again_from_its_last_checkpoint(
    corpus: Path, cache_dir: Path, tmp_path: Path
) -> None:
    settings = (
        *("model=gpt2_tiny", "objective=clm", *cli.TINY, *cli.SAME, "data=text"),
        *(f"data.paths=['{corpus}']", f"data.cache_dir='{cache_dir}'", "data.sequence_length=32"),
        *("trainer.global_batch_size=16", "trainer.micro_batch_size=4", "trainer.max_steps=60"),
        *("trainer.save_every_steps=4", "trainer.log_every_steps=1", "launcher=torchrun"),
        "launcher.nproc_per_node=2",
    )
    alone = cli.shardwright("train", *settings, "run_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr

    hang = ("trainer.hang_timeout_seconds=15", "launcher.max_restarts=2", "run_dir=run")
    started = cli.start("train", *settings, *hang, cwd=tmp_path)
    run_dir = tmp_path / "run"
    try:
        wait_for_step(run_dir, 10)
        os.kill(max(rank_processes(run_dir)), signal.SIGSTOP)
        ended = cli.finish(started)
    finally:
        if started.poll() is None:
            cli.crash(started)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert cli.losses(run_dir) == cli.losses(tmp_path / "alone")
    (restart,) = [each for each in history.read(run_dir) if each["by"] == history.BY_TORCHRUN]
    assert (restart["restart"], restart["world_size"]) == (1, 2)
    assert f"resuming from {restart['checkpoint']}\n" in ended.stdout
    assert re.match(r"Rank \d on node \S+ never came: ", said_of(run_dir))
    assert no_watcher_is_left(run_dir)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_healthy_runs_are_left_alone(fresh: Callable[..., Path], tmp_path: Path) -> None:
    """Fifty of them, with evaluations and saves; every fifth compiles its blocks."""
    for number in range(50):
        run_dir = fresh(30.0 if number % 2 else "auto", compile=number % 5 == 0)
        assert run(run_dir, hanging.none).exit_codes == [0, 0]
        assert not (run_dir / "diagnosis").exists()
        run_dir.rename(tmp_path / f"run-{number}")


def said_of(run_dir: Path) -> str:
    # On a busy machine a step may take as long as a hang; it ends, and the run is left alone.
    *before, verdict = sorted(run_dir.glob("diagnosis/*/verdict.txt"))
    assert {path.read_text() for path in before} <= {"It has moved again meanwhile.\n"}
    return verdict.read_text()


def assert_said(run_dir: Path, said: str) -> None:
    text = said_of(run_dir)
    assert re.match(said, text), text
    first = rank_failures(run_dir)[0]
    assert (first.kind, first.host) == ("Hang", HOST)
    assert re.match(said, first.message)


def watchers(run_dir: Path) -> list[int]:
    """Return the processes of this machine that watch the ranks of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            words = path.read_bytes().split(b"\0")
            if watcher.__name__.encode() in words and os.fsencode(run_dir) in words[-2]:
                found.append(int(path.parent.name))
    return found


def no_watcher_is_left(run_dir: Path) -> bool:
    until = time.monotonic() + 30
    while left := watchers(run_dir):
        assert time.monotonic() < until, left
        time.sleep(0.1)
    return True
