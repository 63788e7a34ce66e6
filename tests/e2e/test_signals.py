"""A signal to whichever process of a run stops all of it, with code 75 and a checkpoint."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from shardwright.train.process.cores import cores_of
from shardwright.train.run_directory import profile_request, stop_note
from tests.e2e.cli import (
    TINY,
    finish,
    on_one_rank,
    parent_of,
    processes,
    rank_process,
    shardwright,
    start,
    start_python,
    wait_for,
    wait_until,
)
from tests.e2e.endings import assert_all_gone, assert_stopped

pytestmark = pytest.mark.distributed

Tiny = Callable[[str], tuple[str, ...]]

FOR_EVER = "trainer.max_steps=100000"


def stopped_by(
    number: signal.Signals, at: Iterable[int], process: subprocess.Popen[str]
) -> subprocess.CompletedProcess[str]:
    for pid in at:
        os.kill(pid, number)
    return finish(process)


@pytest.mark.wide
def test_a_launcher_passes_on_what_asks_for_a_profile_and_what_stops(
    tiny: Tiny, tmp_path: Path
) -> None:
    """To ranks below torchrun, each of which keeps to cores of its own until then."""
    process = start("train", *tiny("clm"), FOR_EVER, "launcher.bind=cores", cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    bound_to = [os.sched_getaffinity(rank_process(tmp_path, rank)) for rank in range(2)]
    assert bound_to == [cores_of(os.sched_getaffinity(0), rank, 2) for rank in range(2)]
    profiles = tmp_path / "run" / "profile"
    os.kill(process.pid, signal.SIGUSR2)
    wait_until(lambda: len(list(profiles.glob("*-rank-0.txt"))) == 1)
    assert profile_request.request(tmp_path / "run", "another node")
    wait_until(lambda: len(list(profiles.glob("*-rank-0.txt"))) == 2)
    ended = stopped_by(signal.SIGUSR1, [process.pid], process)

    assert ended.returncode == 75
    assert "profiling steps " in ended.stderr + ended.stdout
    assert not (tmp_path / "run" / "profile-request").exists()
    where = assert_stopped(ended, tmp_path / "run")
    assert (
        f"stopped at step {where.step} by SIGUSR1; resume with: shardwright resume" in ended.stderr
    )
    assert where.reason == f"SIGUSR1 to the launcher on {socket.gethostname()}"


def test_a_run_that_prepares_its_data_is_seen_stopped_and_resumed(
    corpus: Path, tmp_path: Path
) -> None:
    large = tmp_path / "corpus.jsonl"
    large.write_text(corpus.read_text() * 20)
    arguments = (
        "model=gpt2_tiny",
        *TINY,
        *on_one_rank(()),
        "data=text",
        f"data.paths=['{large}']",
        f"data.cache_dir='{tmp_path / 'cache'}'",
        "data.sequence_length=32",
        "data.eval_fraction=0",
        "trainer.max_steps=1",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=4",
        "run_dir=run",
    )
    tokenizers = tmp_path / "cache" / "tokenizers"
    host = socket.gethostname()

    process = start("train", *arguments, cwd=tmp_path)
    wait_until(lambda: process.poll() is not None or any(tokenizers.glob("*.tmp-*")))
    status = shardwright("status", "run", cwd=tmp_path).stdout
    assert f"  state       preparing data on {host}" in status
    cancelled = shardwright("cancel", "run", cwd=tmp_path)
    ended = finish(process)
    assert (cancelled.returncode, ended.returncode) == (0, 75), cancelled.stderr + ended.stderr
    assert "stopped while preparing data; resume with: shardwright resume" in cancelled.stdout
    assert (
        f"stopped by shardwright cancel on {host} while the data were being prepared: nothing of "
        "them is kept yet, and a resume prepares them from the beginning; resume with: "
        f"shardwright resume {tmp_path / 'run'}\n"
    ) in ended.stderr
    status = shardwright("status", "run", cwd=tmp_path).stdout
    assert f"stopped while preparing data by shardwright cancel on {host}\n" in status

    process = start("resume", "run", cwd=tmp_path)
    wait_until(lambda: process.poll() is not None or any(tokenizers.glob("*.tmp-*")))
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert ended.returncode == 75
    assert "\nstopping the preparation of the data; Ctrl-C again kills\n" in ended.stderr
    assert "stopped by Ctrl-C while the data were being prepared: nothing" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("cache/*/*.tmp-*"))
    assert_all_gone(tmp_path)

    ended = finish(start("resume", "run", cwd=tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


# Whom a signal is sent, of launcher, torchrun and two ranks.
TARGETS: dict[str, Callable[[int, int, list[int]], list[int]]] = {
    "launcher": lambda launcher, torchrun, ranks: [launcher],
    "torchrun": lambda launcher, torchrun, ranks: [torchrun],
    "rank 1": lambda launcher, torchrun, ranks: [ranks[1]],
    "both ranks": lambda launcher, torchrun, ranks: ranks,
    "every process": lambda launcher, torchrun, ranks: [launcher, torchrun, *ranks],
    "every process twice": lambda launcher, torchrun, ranks: 2 * [launcher, torchrun, *ranks],
}


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("objective", ["clm", "mlm"])  # under fsdp and zero3
def test_a_signal_to_any_process_stops_all(
    objective: str, target: str, number: signal.Signals, tiny: Tiny, tmp_path: Path
) -> None:
    if number == signal.SIGINT and "twice" in target:
        pytest.skip("a second Ctrl-C kills")
    process = start(
        "train", *tiny(objective), FOR_EVER, "trainer.dataloader_workers=1", cwd=tmp_path
    )
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    ranks = [rank_process(tmp_path, rank) for rank in range(2)]
    torchrun = parent_of(ranks[0])
    assert torchrun is not None
    ended = stopped_by(number, TARGETS[target](process.pid, torchrun, ranks), process)

    assert ended.returncode == 75, ended
    assert_stopped(ended, tmp_path / "run")


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("target", ["launcher", "rank"])
def test_a_run_of_one_rank_stops_too(
    target: str, number: signal.Signals, tiny: Tiny, tmp_path: Path
) -> None:
    process = start("train", *on_one_rank(tiny("clm")), FOR_EVER, cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    (rank,) = set(processes(tmp_path)) - {process.pid}
    ended = stopped_by(number, [process.pid if target == "launcher" else rank], process)

    assert ended.returncode == 75, ended
    assert_stopped(ended, tmp_path / "run")


@pytest.mark.faults
def test_torchrun_started_by_hand_stops_too(tiny: Tiny, tmp_path: Path) -> None:
    process = start("train", *tiny("clm"), FOR_EVER, cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    stopped_by(signal.SIGTERM, [process.pid], process)
    run_dir = tmp_path / "run"
    (tmp_path / "train.py").write_text("raise SystemExit('the user has a train.py as well')")
    script = str(Path(sysconfig.get_path("scripts")) / "shardwright")
    rank = ("--no-python", script, "rank", str(run_dir))
    command = ("-m", "torch.distributed.run", "--nproc-per-node=2", *rank)
    before = stop_note.read(run_dir)
    assert before is not None
    process = start_python(*command, cwd=tmp_path)
    metrics = run_dir / "metrics.jsonl"
    while f'"step": {before.step + 2}' not in metrics.read_text():
        assert process.poll() is None, finish(process)
        time.sleep(0.05)
    ended = stopped_by(signal.SIGTERM, [process.pid], process)

    assert ended.returncode == 1, "torchrun's own"
    after = stop_note.read(run_dir)
    assert after is not None
    assert after.progress_steps == after.step - before.step >= 2
    assert_all_gone(tmp_path)


@pytest.mark.faults
def test_a_second_ctrl_c_kills(tiny: Tiny, tmp_path: Path) -> None:
    process = start("train", *tiny("clm"), FOR_EVER, cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    for rank in range(2):
        os.kill(rank_process(tmp_path, rank), signal.SIGSTOP)  # they would stop too soon
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    ended = finish(process)

    assert ended.returncode == 128 + signal.SIGINT
    assert "stopped by Ctrl-C before the ranks could report where; resume with" in ended.stderr
    assert_all_gone(tmp_path)
