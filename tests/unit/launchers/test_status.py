"""What `shardwright status`, `logs` and `cancel` make of a run's directory."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers import runs
from shardwright.launchers.commands import logs
from shardwright.launchers.commands.status import described, table
from shardwright.launchers.ranks.processes import rank_processes
from shardwright.launchers.runs import (
    WORDS,
    Status,
    everywhere,
    known_steps,
    left_seconds,
    reached,
    state_of,
)
from shardwright.launchers.slurm.jobs import Job
from shardwright.train.config import BatchSizes
from shardwright.train.errors import UserError
from shardwright.train.process.arguments import ENCODED, encoded
from shardwright.train.run_directory.failures import RankFailure
from shardwright.train.run_directory.metrics import tail
from shardwright.train.run_directory.owner import PREPARING, STARTING, Owner
from shardwright.train.run_directory.pruned import Pruned
from shardwright.train.run_directory.stop_note import Stopped
from tests.unit.launchers.configs import config
from tests.unit.launchers.fakes import Shardwright, make_shardwright
from tests.unit.launchers.run_directories import a_run

shardwright = pytest.fixture(make_shardwright)

PRUNED = Pruned(6, "eval_loss", 3.5, "3.5 at step 6 is not in the best 25%", 4, 0.0)
FAILURE = RankFailure(1.0, 3, "node2", "RuntimeError", "boom", "")
STOPPED = Stopped(8, 64, "SIGUSR1 on ranks 0, 1", 1.0, "/r/checkpoints/checkpoint-8", 8)


def owner_of(doing: str | None = None, host: str = "node1") -> Owner:
    return Owner(host, 1, 1.0, None, doing)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"job": Job("7", "PENDING", "Priority")}, ("pending (Priority)", False)),
        (
            {"job": Job("7", "RUNNING", nodes="node[1-2]", restarts=1), "is_done": True},
            ("running on node[1-2], restart 1", False),
        ),
        ({"ranks_here": 2, "stopped": STOPPED}, ("running, 2 rank(s) here", False)),
        ({"is_done": True}, ("done", True)),
        ({"job": Job("7", "COMPLETED"), "is_done": True}, ("done", True)),
        ({"stopped": STOPPED}, ("stopped at step 8 by SIGUSR1 on ranks 0, 1", True)),
        ({"stopped": STOPPED, "pruned": PRUNED}, ("pruned at step 6", True)),
        ({"ranks_here": 1, "pruned": PRUNED}, ("running, 1 rank(s) here", False)),
        ({"is_done": True, "pruned": PRUNED}, ("done", True)),
        # A run that was done, went on and failed.
        (
            {"is_done": True, "failures": [FAILURE]},
            ("failed: rank 3 on node2, RuntimeError: boom", True),
        ),
        ({"job": Job("7", "OUT_OF_MEMORY", exit_code=137)}, ("out_of_memory, exit code 137", True)),
        ({"silent_seconds": 5.0}, ("running, last heard of 5 s ago", False)),
        ({"silent_seconds": 7200.0}, ("silent for 2 h 0 min", True)),
        ({}, ("no step yet, and no process here", False)),
        # Whoever holds the lock is alive, and what this host's last owner no longer holds is dead,
        # however short a time ago it was heard of.
        ({"owned": (owner_of(PREPARING), True)}, ("preparing data on node1", False)),
        (
            {"owned": (owner_of(PREPARING), True), "prepared": "tokenising: 1 MB of 2 MB"},
            ("preparing data on node1: tokenising: 1 MB of 2 MB", False),
        ),
        (
            {"owned": (owner_of(STARTING), True), "prepared": "old"},
            ("starting its ranks on node1", False),
        ),
        (
            {"job": Job("7", "RUNNING", nodes="n1"), "prepared": "tokenising"},
            ("running on n1, preparing data: tokenising", False),
        ),
        (
            {"job": Job("7", "PENDING", "Priority"), "prepared": "old"},
            ("pending (Priority)", False),
        ),
        ({"owned": (owner_of(), True), "silent_seconds": 7200.0}, ("running on node1", False)),
        ({"owned": (owner_of(), True), "ranks_here": 2}, ("running, 2 rank(s) here", False)),
        ({"owned": (None, True)}, ("running", False)),
        (
            {"owned": (owner_of(), False), "silent_seconds": 5.0},
            ("dead: it was killed or crashed, and could not report it", True),
        ),
        (
            {"owned": (owner_of(PREPARING), False)},
            ("dead: it was killed or crashed while preparing data, and could not report it", True),
        ),
        ({"owned": (owner_of(), False), "stopped": STOPPED}, (str(STOPPED), True)),
        ({"owned": (owner_of(), False), "is_done": True}, ("done", True)),
        (
            {"owned": (owner_of(host="node2"), False), "silent_seconds": 5.0},
            ("running, last heard of 5 s ago", False),
        ),
    ],
)
def test_state(known: dict[str, Any], expected: tuple[str, bool]) -> None:
    nothing: dict[str, Any] = {
        "job": None,
        "is_done": False,
        "stopped": None,
        "failures": [],
        "ranks_here": 0,
        "owned": (None, False),
        "silent_seconds": None,
        "here": "node1",
    }
    state = state_of(**{**nothing, **known})
    assert state[:2] == expected
    assert state.word in WORDS
    is_over = state.word in WORDS[WORDS.index("done") :]
    assert is_over == state.is_over, "by the word it is chosen"


def test_how_far_the_data_are_is_told_until_they_are_there(tmp_path: Path) -> None:
    assert runs._prepared(tmp_path) is None
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "progress.txt").write_text("tokenising: 1 MB of 2 MB")
    assert runs._prepared(tmp_path) == "tokenising: 1 MB of 2 MB"
    (tmp_path / "data.json").write_text("{}")
    assert runs._prepared(tmp_path) is None


def test_the_ranks_of_a_run_are_found_by_its_directory_plain_or_encoded(tmp_path: Path) -> None:
    run_dir = tmp_path / "a b"
    older = "train"
    (tmp_path / "shardwright").mkdir()
    (tmp_path / "shardwright" / "__init__.py").touch()
    for module in ("shardwright/train", older, "launcher"):
        (tmp_path / f"{module}.py").write_text("import time; print(flush=True); time.sleep(60)")
    script = tmp_path / "packages" / "train" / "__main__.py"
    script.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "train.py", script)
    arguments = {
        "torchrun's": ("-u", "-m", "shardwright.train", str(run_dir)),
        "an older run's": ("-u", "-m", older, str(run_dir)),
        "DeepSpeed's over a hostfile": ("-u", "-m", "shardwright.train", encoded(str(run_dir))),
        "DeepSpeed's by srun": ("-u", str(script), encoded(str(run_dir))),
        "another run's by srun": ("-u", str(script), encoded(str(tmp_path / "b"))),
        "by hand": ("-m", "shardwright.train", str(run_dir)),
        "an older run's by hand": ("-m", older, str(run_dir)),
        "another run's": ("-m", "shardwright.train", encoded(str(tmp_path / "b"))),
        "what is no run's": ("-m", "shardwright.train", f"{ENCODED}?"),
        "a launcher": ("-m", "launcher", "-m", "shardwright.train", str(run_dir)),
    }
    started = {
        name: subprocess.Popen([sys.executable, *words], cwd=tmp_path, stdout=subprocess.PIPE)
        for name, words in arguments.items()
    }
    try:
        for process in started.values():
            assert process.stdout is not None
            process.stdout.readline()  # it has its arguments
        found = rank_processes(run_dir)
        assert {name for name, process in started.items() if process.pid in found} == {
            *("torchrun's", "DeepSpeed's over a hostfile", "DeepSpeed's by srun", "by hand"),
            *("an older run's", "an older run's by hand"),
        }
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def test_time_left_follows_from_the_speed_of_the_last_steps() -> None:
    last = {"step": 25, "samples": 200, "tokens": 25 * 1024, "tokens_per_second": 512.0}
    eight, sixteen = BatchSizes(8, 8), BatchSizes(16, 16)
    assert left_seconds(last, 100, eight) == 150.0
    assert left_seconds(last, 100, sixteen) == 300.0, "the batch was doubled since"
    # A step of 10, 12 and 14 samples each, and 72 of 16.
    grows = BatchSizes(16, 2, 236)
    assert [grows.after(200, steps) - 200 for steps in (1, 2, 3, 4)] == [14, 29, 44, 60]
    assert left_seconds(last, 100, grows) == 300.0 * (60 + 71 * 16) / (75 * 16)
    assert left_seconds(last, None, eight) is None
    assert left_seconds({}, 100, eight) is None


@pytest.mark.parametrize(
    ("logged_step", "saved_steps", "done_steps", "step"),
    [(1, [6, 8], 8, 8), (1, [6], None, 6), (7, [6], None, 7), (None, [], None, None)],
)
def test_a_run_has_come_to_what_it_has_logged_or_saved(
    logged_step: int | None, saved_steps: list[int], done_steps: int | None, step: int | None
) -> None:
    assert reached(logged_step, saved_steps, done_steps) == step


def test_the_steps_that_are_left_follow_from_what_was_consumed(tmp_path: Path) -> None:
    last = {"step": 8, "samples": 64, "tokens": 4096}
    tokens = {"max_steps": None, "max_tokens": 128 * 64}
    for batch_size, steps in ((8, 16), (16, 12), (4, 24)):
        run = config(
            trainer={**tokens, "global_batch_size": batch_size, "micro_batch_size": 4},
            data={"kind": "stdlib", "sequence_length": 64},
        )
        assert known_steps(tmp_path, run, last) == steps
    lines = config(
        trainer={**tokens, "global_batch_size": 16, "micro_batch_size": 4},
        data={"kind": "stdlib", "sequence_length": 64, "line_by_line": True},
    )
    assert known_steps(tmp_path, lines, last) is None
    note = {"training": {"samples_per_epoch": 200, "samples_of_tokens": {"8192": 720}}}
    (tmp_path / "data.json").write_text(json.dumps(note))
    assert known_steps(tmp_path, lines, last) == 8 + (720 - 64) // 16


def test_the_steps_of_epochs_are_known_once_the_data_are_prepared(tmp_path: Path) -> None:
    run = config(trainer={"max_epochs": 2.5, "global_batch_size": 16})
    assert known_steps(tmp_path, run) is None
    (tmp_path / "data.json").write_text('{"training": {"samples_per_epoch": 161}}')
    assert known_steps(tmp_path, run) == 26
    (tmp_path / "data.json").write_text('{"training": {}}')  # of a run that began before
    assert known_steps(tmp_path, run) is None
    assert known_steps(tmp_path, config(trainer={"max_steps": 7})) == 7


def test_one_run_is_described_and_several_are_a_table() -> None:
    one = Status(
        Path("/w/runs/a"), "running on node1", False, "7", 25, 100, 4.87654, 5120.4, 150.0, None
    )
    assert described(one) == (
        "/w/runs/a\n  state       running on node1\n  job         7\n  step        25/100\n"
        "  loss        4.8765\n  tokens/s    5,120\n  left        2 min\n  checkpoint  none yet"
    )
    done = Status(Path("/elsewhere/b"), "done", True, step=9, checkpoint="checkpoint-9")
    assert table([one, done], Path("/w")) == (
        "run           job    step    loss  tokens/s   left  checkpoint  state\n"
        "runs/a          7  25/100  4.8765     5,120  2 min           -  running on node1\n"
        "/elsewhere/b    -       9       -         -      -           9  done"
    )


FAILED_LONG = "failed: rank 3 on node2, RuntimeError: " + "a long reason " * 9
MANY = [
    Status(Path(f"/w/sweeps/learning-rates/{n}"), state, True, None, 25, 100, 4.8, 5120.0, None)
    for n, state in enumerate(["done", FAILED_LONG])
]


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
def test_a_table_fits_the_terminal(width: int) -> None:
    lines = table(MANY, Path("/w"), width).splitlines()
    assert max(map(len, lines)) <= width
    head = lines[0].split()
    assert head[0] == "run"
    assert head[-1] == "state"
    assert ("step" in head) == (width >= 60), "what is least needed goes first"
    assert "job" not in head, "nothing is in it"
    assert ["learning-rates/0" in lines[1], "learning-rates/1" in lines[2]] == [True, True]
    assert "failed: rank 3 on n" in lines[2]
    assert lines[2].endswith("…")


def test_a_table_that_fits_or_goes_into_a_file_is_whole() -> None:
    whole = table(MANY, Path("/w"))
    assert FAILED_LONG.rstrip() in whole
    assert table(MANY, Path("/w"), 1000) == whole


def test_one_run_fits_the_terminal_with_its_words_whole() -> None:
    one = Status(Path("/w/runs/a"), FAILED_LONG.strip(), True, can_resume=True)
    lines = described(one, 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[1].startswith("  state       failed: rank 3 on node2, ")
    assert all(line.startswith(" " * 14) for line in lines[2:5])
    assert lines[-1] == "  resume      shardwright resume /w/runs/a"


def test_metrics_are_read_from_the_end_without_the_line_that_is_being_written(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(9000))
    path.write_text(lines + '{"step": 90')
    assert tail(path)[-1] == {"step": 8999, "loss": 1.0}
    assert 0 < len(tail(path)) < 9000
    assert tail(tmp_path / "none.jsonl") == []


def test_a_loss_is_found_behind_long_lines_of_statistics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    modules = {f"weight_norm/model.layers.{n}.self_attn.q_proj": 1.0 for n in range(2000)}
    statistics = "".join(json.dumps({"step": n, **modules}) + "\n" for n in range(10))
    lines = "".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(300_000))
    path.write_text(lines + statistics)
    found = tail(path)
    assert found[-11]["loss"] == 1.0
    assert len(found) < 200_000, "and not all of the file is read"


def test_all_are_those_here_and_those_in_the_queue(tmp_path: Path) -> None:
    here = [
        a_run(tmp_path / "here" / p) for p in ("runs/b", "sweeps/s/0", "sweeps/s/2", "sweeps/s/10")
    ]
    there, task = a_run(tmp_path / "there"), a_run(tmp_path / "array" / "3")
    queued = {"7": there, "8_3": task.parent, "9": here[0], "10": tmp_path}
    assert everywhere(tmp_path / "here", queued) == [*here, there, task]


def test_a_sweeps_directory_stands_for_its_runs(shardwright: Shardwright, tmp_path: Path) -> None:
    for number in "01":
        a_run(tmp_path / "sweep" / number)
    (tmp_path / "sweep" / "1" / "config.yaml").write_text("nonsense: 1\n")
    a_run(tmp_path / "sweep" / "2")
    (tmp_path / "sweep" / "2" / "data.json").mkdir()  # whatever is wrong with one of them
    (tmp_path / "sweep" / "2" / "metrics.jsonl").write_text('{"step": 3}\n[1]\n')
    (tmp_path / "sweep" / "2" / "slurm.json").mkdir()
    (tmp_path / "sweep" / "3").mkdir()
    (tmp_path / "sweep" / "3" / "config.yaml").write_bytes(b"\xff")
    a_run(tmp_path / "sweep" / "4")
    shown = shardwright("status", "sweep").out.splitlines()
    assert [line.split()[0] for line in shown] == [
        *("run", "sweep/0", "sweep/1", "sweep/2", "sweep/3", "sweep/4")
    ]
    assert "cannot be read: " in shown[2]
    assert "cannot be read: " in shown[4]
    assert shown[1].partition("no step yet")[1] == shown[5].partition("no step yet")[1] != ""
    outcome = shardwright("logs", "sweep")
    assert outcome.code == 2
    assert "holds 5 runs; give one of them, such as" in outcome.err


def test_logs_are_the_jobs_or_a_ranks(shardwright: Shardwright, tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    assert "has no log yet; --follow waits for it" in shardwright("logs", "run").err
    (run_dir / "logs" / "rank-0.log").write_text("all of rank 0\n")
    assert shardwright("logs", "run").out == "all of rank 0\n"
    (run_dir / "logs" / "job-7.log").write_text("what the job says\n")
    assert shardwright("logs", "run").out == "what the job says\n"
    assert shardwright("logs", "run", "--rank", "0").out == "all of rank 0\n"
    outcome = shardwright("logs", "run", "--rank", "3")
    assert outcome.code == 2
    assert "has no logs/rank-3.log; there are job-7.log, rank-0.log" in outcome.err


def test_following_a_log_shows_what_comes_to_it_until_the_run_is_over(tmp_path: Path) -> None:
    path, out = tmp_path / "log", io.BytesIO()
    texts = ["first\n", "second\n", "written at the very end\n"]

    def is_over() -> bool:
        with path.open("a") as file:
            file.write(texts.pop(0))
        return not texts

    started = time.monotonic()
    logs.follow(lambda: path if path.exists() else None, out, is_over=is_over)
    assert out.getvalue() == b"first\nsecond\nwritten at the very end\n"
    assert time.monotonic() - started < 10


def test_a_queue_that_does_not_answer_hides_no_run_of_this_directory(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> dict[str, Path]:
        raise UserError("squeue has had no answer for 30 s")

    monkeypatch.setattr("shardwright.launchers.slurm.jobs.working_directories", silent)
    for number in "01":
        a_run(tmp_path / "runs" / number)
    outcome = shardwright("status", "all")
    assert outcome.code == 0
    assert "runs/0" in outcome.out
    assert "warning: squeue has had no answer for 30 s; only the runs below" in outcome.err


def test_a_full_disk_is_said_without_a_traceback(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "resumes/1.tmp"))

    monkeypatch.setattr("shardwright.launchers.resumes.write", full)
    a_run(tmp_path / "run")
    outcome = shardwright("resume", "run", "launcher=local", "launcher.device=cpu")
    assert outcome.code == 1
    assert outcome.err == (
        f"error: the disk is full where {tmp_path / 'resumes/1.tmp'} is to be written; free some "
        "space, and try again\n"
    )


def test_cancelling_a_sweep_stops_what_runs_and_passes_over_the_rest(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is over, one that the queue does not tell of, one that runs, one not begun."""
    runs = [a_run(tmp_path / "sweep" / number) for number in "0123"]
    events: list[tuple[str, Path]] = []
    left = {runs[2]: 3}

    def asked(run_dir: Path, *, now: bool) -> bool:
        events.append(("asked", run_dir))
        left[run_dir] = left.get(run_dir, 0) - 1
        return left[run_dir] >= 0

    def job_of(run_dir: Path) -> str | None:
        if run_dir == runs[1]:
            raise UserError("scontrol has had no answer")
        return None

    monkeypatch.setattr("shardwright.launchers.commands.cancel._request_stop", asked)
    monkeypatch.setattr("shardwright.launchers.commands.cancel.POLL_SECONDS", 0)
    monkeypatch.setattr("shardwright.launchers.slurm.jobs.job_of", job_of)
    outcome = shardwright("cancel", "sweep")
    assert outcome.code == 2, "one may still run"
    assert f"error: {runs[1]}: scontrol has had no answer" in outcome.err
    assert outcome.out == f"{runs[2]}: ended; resume with: shardwright resume {runs[2]}\n"
    assert [run_dir for _, run_dir in events[:3]] == [runs[0], runs[2], runs[3]]

    monkeypatch.setattr("shardwright.launchers.slurm.jobs.job_of", lambda run_dir: None)
    left[runs[2]] = 2
    assert shardwright("cancel", "sweep").code == 0
    outcome = shardwright("cancel", "sweep")
    assert outcome.code == 2
    assert (
        f"none of the 4 runs in {tmp_path / 'sweep'} is running, here or elsewhere" in outcome.err
    )


def test_cancelling_what_does_not_run(shardwright: Shardwright, tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    outcome = shardwright("cancel", "run")
    assert outcome.code == 2
    assert "is not running: no job in the queue and no process here" in outcome.err
    assert "is not a run directory" in shardwright("status", "nowhere").err
