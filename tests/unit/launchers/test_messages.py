"""Who failed first, and what exit code follows."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.messages import exit_code, failure, header, stopped
from shardwright.train.checkpoint.format import layout
from shardwright.train.errors import UserError
from shardwright.train.run_directory.failures import RankFailure, note_failure, rank_failures
from shardwright.train.run_directory.stop_note import Stopped
from tests.unit.launchers.configs import TREE, config


def note(logs: Path, rank: int, time: float, kind: str = "RuntimeError") -> None:
    logs.mkdir(exist_ok=True)
    text = {
        "time": time,
        "rank": rank,
        "host": f"node-{rank}",
        "kind": kind,
        "message": "boom",
        "traceback": f"Traceback\nRuntimeError: rank {rank}",
    }
    (logs / f"rank-{rank}.error.json").write_text(json.dumps(text))


def test_first_to_fail_comes_first(tmp_path: Path) -> None:
    for rank, time in ((0, 12.5), (1, 12.25), (10, 12.75)):
        note(tmp_path / "logs", rank, time)
    failures = rank_failures(tmp_path)
    assert [found.rank for found in failures] == [1, 0, 10]
    text = failure(1, failures, tmp_path, None)
    assert text.startswith("rank 1 on node-1 failed first:")
    assert "RuntimeError: rank 1" in text
    assert "ranks that failed after it: 0, 10" in text
    assert str(tmp_path / "logs" / "rank-1.log") in text


def test_a_divergence_is_told_in_one_line_without_a_traceback(tmp_path: Path) -> None:
    note(tmp_path / "logs", 1, 1.0, "Diverged")
    text = failure(1, rank_failures(tmp_path), tmp_path, None)
    assert text == f"error: boom\n  log: {tmp_path}/logs/rank-1.log"
    assert exit_code(1, rank_failures(tmp_path), None) == 1


def test_half_written_note_is_passed_over(tmp_path: Path) -> None:
    note(tmp_path / "logs", 3, 1.0)
    (tmp_path / "logs" / "rank-4.error.json").write_text('{"time": 0.5, ')
    assert [found.rank for found in rank_failures(tmp_path)] == [3]


@pytest.mark.parametrize(
    ("child_code", "kinds", "stopped_by", "code"),
    [
        (0, [], None, 0),
        (1, [], None, 1),
        (-signal.SIGKILL, [], None, 1),
        (1, ["RuntimeError"], None, 1),
        (1, ["UserError", "RuntimeError"], None, 2),
        (1, ["RuntimeError", "UserError"], None, 1),
        (2, [], None, 2),
        (75, [], None, 75),
        (1, [], signal.SIGTERM, 143),
        (1, ["KeyboardInterrupt"], signal.SIGINT, 130),
        (0, [], signal.SIGTERM, 0),
    ],
)
def test_exit_code(child_code: int, kinds: list[str], stopped_by: int | None, code: int) -> None:
    failures = [RankFailure(float(n), n, "host", kind, "", "") for n, kind in enumerate(kinds)]
    assert exit_code(child_code, failures, stopped_by) == code


def test_a_clean_stop_names_its_step_and_how_to_go_on() -> None:
    where = Stopped(7, 56, "SIGUSR1 on rank 1", 1.0, "/a b/checkpoints/checkpoint-7", 7)
    assert stopped(where, Path("/a b"), None) == (
        "\nstopped at step 7 by SIGUSR1 on rank 1; resume with: shardwright resume '/a b'"
    )
    assert "stopped at step 7 by SIGTERM; resume" in stopped(where, Path("/a b"), signal.SIGTERM)


def test_a_stop_without_time_to_save_says_what_it_goes_on_from() -> None:
    why = "a save takes 40.0 s, and 29.5 s were left of launcher.grace_seconds=30; raise it"
    where = Stopped(9, 72, "SIGTERM on rank 0", 1.0, "/run/checkpoints/checkpoint-7", 4, why)
    assert stopped(where, Path("/run"), None).endswith(f"\n  checkpoint-7 is the newest: {why}")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "DistNetworkError: The server socket has failed to listen on any local network "
            "address. port: 29755, useIpv6: false, code: -98, name: EADDRINUSE, message: address",
            "error: launcher.head_port=29755 is taken on this node",
        ),
        (
            "DistNetworkError: The client socket has timed out after 60000ms while trying to "
            "connect to (node1, 29500).",
            "error: nothing answered at launcher.head_address=node1, launcher.head_port=29500 "
            "for 60 s; check whether `shardwright train`",
        ),
    ],
)
def test_nodes_that_did_not_meet(tmp_path: Path, said: str, told: str) -> None:
    log = tmp_path / "logs" / "torchrun-node2.log"
    log.parent.mkdir()
    log.write_text(f"{said}\n\nTraceback\napi.RendezvousConnectionError: The connection failed.")
    assert failure(1, [], tmp_path, None, log.name).startswith(told)


def test_message_of_bad_input_stands_alone(tmp_path: Path) -> None:
    note(tmp_path / "logs", 0, 1.0, kind="UserError")
    text = failure(1, rank_failures(tmp_path), tmp_path, None)
    assert text.startswith("error: boom\n")
    assert "Traceback" not in text


@pytest.mark.parametrize("code", [-signal.SIGKILL, 1])
def test_a_death_names_the_newest_checkpoint_and_the_command_to_resume(
    tmp_path: Path, code: int
) -> None:
    """Whether the rank could report it or not."""
    run_dir = tmp_path / "my run"
    (run_dir / "logs").mkdir(parents=True)
    run = machine.resolve(config(), Machine(), str(run_dir))
    text = failure(code, [], run_dir, None, config=run)
    assert "\n  newest checkpoint: none, so a resume starts the run from the beginning\n" in text
    assert f"\n  resume it with: shardwright resume '{run_dir}'\n" in text
    for step in (2, 4):
        checkpoint = run_dir / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        layout.write_manifest(checkpoint, {"step": step, "files": {}})
    if code == 1:
        note(run_dir / "logs", 3, 1.0)
    text = failure(code, rank_failures(run_dir), run_dir, None, config=run)
    assert "\n  newest checkpoint: checkpoint-4\n" in text
    assert ("less is needed with trainer.micro_batch_size=" in text) == (code != 1)
    # Ranks that only sample or measure leave nothing to resume.
    assert "resume" not in failure(code, rank_failures(run_dir), run_dir, None)
    assert failure(1, [], run_dir, signal.SIGINT) == "stopped by Ctrl-C"


def test_what_ran_out_is_told_instead_of_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    run = machine.resolve(config(), Machine(), str(tmp_path))
    error = MemoryError("17 GiB for an array")
    assert note_failure(tmp_path, 1, error, "host memory has run out: 17 GiB\nless is needed")
    text = failure(1, rank_failures(tmp_path), tmp_path, None, config=run)
    assert "failed first:\n    host memory has run out: 17 GiB\n    less is needed\n" in text
    assert "MemoryError" not in text


def test_what_several_ranks_find_out_is_first_said_by_one(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert note_failure(tmp_path, 1, UserError("data.paths: nothing there"))
    assert not note_failure(tmp_path, 0, UserError("data.paths: nothing there"))
    assert note_failure(tmp_path, 2, UserError("another"))


def test_the_header_fits_the_terminal(tmp_path: Path) -> None:
    environment = {f"A_LONG_VARIABLE_{n}": f"value-{n}" for n in range(9)}
    run = machine.resolve(config(), Machine(), "/a/long/path" * 12)
    whole = header(run, {}, Machine(), environment)
    lines = header(run, {}, Machine(), environment, 72).splitlines()
    too_long = [line for line in lines if len(line) > 72]
    assert [line.strip().removeprefix("run dir").strip() for line in too_long] == [run.run_dir]
    assert " ".join(whole.split()) == " ".join("\n".join(lines).split())
    (first,) = [number for number, line in enumerate(lines) if line.startswith("  env ")]
    assert lines[first + 1].startswith(" " * 12 + "A_LONG_VARIABLE_")


def test_the_header_says_how_the_batch_grows() -> None:
    trainer = {"global_batch_size": 64, "micro_batch_size": 8, "max_steps": 9}
    growing = {"batch_warmup_from": 16, "batch_warmup_samples": 5000}
    run = config(trainer={**trainer, **growing}, launcher={"kind": "torchrun", "device": "cpu"})
    line = "64 samples = 8 x 8 x 1 rank(s), from 16 on over the first 5,000 samples; 9 steps"
    assert line in header(machine.resolve(run, Machine(), "/runs/a"), {}, Machine(), {})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "64 tokens a sample, documents see each other"),
        ({"document_attention": True}, "64 tokens a sample, documents kept apart"),
        ({"line_by_line": True}, "64 tokens a sample, lines end to end"),
        ({"line_by_line": True, "unpad": False}, "64 tokens a sample, lines padded"),
    ],
)
def test_the_header_says_what_a_token_sees(data: dict[str, bool], said: str) -> None:
    run = machine.resolve(config(data={**TREE["data"], **data}), Machine(), "/runs/a")
    assert said in header(run, {}, Machine(), {})


TORCHRUN_LOG = """
Failures:
[1]:
  time      : 2026-11-29_03:40:00
  host      : node-0
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 11)
  error_file: <N/A>
Root Cause (first observed failure):
[0]:
  time      : 2026-11-29_03:40:00
  host      : node-0
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 12)
  error_file: <N/A>
"""


def test_a_rank_that_was_killed_comes_before_those_that_report_it_gone(tmp_path: Path) -> None:
    note(tmp_path / "logs", 0, 1.0)
    log = tmp_path / "logs" / "torchrun.log"
    log.write_text(TORCHRUN_LOG.format(rank=1, code=-9))
    run = machine.resolve(config(), Machine(), str(tmp_path))
    text = failure(1, rank_failures(tmp_path), tmp_path, None, config=run)
    assert text.startswith("rank 1 was killed by SIGKILL without a report; the kernel does this")
    assert "\n  ranks that failed after it: 0\n  newest checkpoint: none" in text
    assert "Traceback" not in text
    log.write_text(TORCHRUN_LOG.format(rank=1, code=1))
    text = failure(1, rank_failures(tmp_path), tmp_path, None, config=run)
    assert text.startswith("rank 0 on node-0 failed first:\n")
