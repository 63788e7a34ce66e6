"""A job that is cut starts again while it gets on, and not for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.launchers.requeue import main, should_requeue
from tests.checkpoints import write_checkpoint

RESTART, RESUME = {"requeued_at_step": 20}, {"checkpoint": "checkpoint-20", "overrides": []}
ELASTIC_RESTART = {"by": "torchrun", "restart": 1, "checkpoint": "checkpoint-20"}


@pytest.mark.parametrize(
    ("history", "newest_step", "restarts", "yes", "why"),
    [
        ([], 0, 0, True, "resumes from step 0 (restart 1 of at most 5)"),
        ([RESTART], 30, 1, True, "resumes from step 30 (restart 2 of at most 5)"),
        (
            [RESTART],
            20,
            1,
            False,
            "no progress since the last restart: the newest whole checkpoint",
        ),
        ([{"requeued_at_step": 0}], 0, 1, False, "was of step 0 and is of step 0"),
        ([RESTART, ELASTIC_RESTART], 20, 1, False, "no progress since the last restart"),
        # Somebody has looked after it meanwhile.
        ([RESTART, RESUME], 20, 1, True, "resumes from step 20"),
        # By SLURM itself after a node failed, which asks nobody.
        ([RESTART], 30, 4, True, "restart 5 of at most 5"),
        ([RESTART], 30, 5, False, "restarted 5 times, which is the limit"),
    ],
)
def test_a_job_starts_again_while_it_gets_on(
    history: list[dict[str, object]], newest_step: int, restarts: int, yes: bool, why: str
) -> None:
    found, reason = should_requeue(history, newest_step, restarts=restarts, limit=5)
    assert found is yes
    assert why in reason


def test_progress_is_read_off_the_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    write_checkpoint(tmp_path / "checkpoints", 4)
    assert main([str(tmp_path), "--restarts", "0"]) == 0
    # The next start claims much and leaves half a checkpoint.
    (tmp_path / "stopped.json").write_text('{"step": 9, "progress_steps": 5}')
    torn = write_checkpoint(tmp_path / "checkpoints", 9)
    (torn / "engine" / "shard-0.pt").unlink()
    assert main([str(tmp_path), "--restarts", "1"]) == 1
    write_checkpoint(tmp_path / "checkpoints", 9)
    assert main([str(tmp_path), "--restarts", "1", "--limit", "2"]) == 0

    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0].partition(" (")[0] for line in said] == [
        "resumes from step 4",
        "no progress since the last restart",
        "resumes from step 9",
    ]
    lines = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    assert [(line["restart"], line["checkpoint"]) for line in lines] == [
        (1, "checkpoint-4"),
        (2, "checkpoint-9"),
    ]
