"""What `shardwright diagnose` prints of ranks; without any."""

from __future__ import annotations

from pathlib import Path

from shardwright.launchers.commands import diagnose
from shardwright.launchers.commands.diagnose import Found
from shardwright.train.diagnosis.beats import STOPPED, Beat
from shardwright.train.diagnosis.verdict import Verdict
from shardwright.train.process.heartbeat import Phase


def beat(rank: int, *, still: float = 1.0, compute: float = 0.1, state: str = "S") -> Beat:
    return Beat(
        rank=rank,
        host=f"node{rank // 2}",
        pid=100 + rank,
        count=9,
        step=13,
        phase=Phase.COMPUTE,
        still_seconds=still,
        longest_step_seconds=1.0,
        longest_save_seconds=0.0,
        compute_seconds=compute,
        wait_seconds=0.02,
        data_seconds=0.01,
        state=state,
    )


FOUR = [beat(0), beat(1), beat(2, compute=0.3), beat(3)]


def test_a_table_of_ranks_and_one_of_nodes() -> None:
    text = diagnose.said(Path("/runs/a"), Found("running", FOUR, None, None), 100)
    lines = text.splitlines()
    assert lines[0] == "/runs/a: running"
    assert lines[2].split() == ["rank", "node", "step", "where", "moved", "process"]
    assert "in the forward or backward pass" in lines[3]
    assert lines[-5].split()[:2] == ["node", "ranks"]
    assert lines[-4].split()[:4] == ["node0", "2", "100", "ms"]
    assert lines[-4].endswith("rank 0, 110 ms")
    assert lines[-3].endswith("rank 2, 310 ms")
    assert lines[-1] == "ranks move"
    assert all(len(line) <= 80 for line in diagnose.table(FOUR, 80))


def test_the_verdict_stands_below() -> None:
    verdict = Verdict((1,), "Rank 1 on node node0 never came.")
    text = diagnose.said(Path("/runs/a"), Found("running", FOUR, verdict, Path("/runs/a/d")), 80)
    assert "  Rank 1 on node node0 never came." in text
    assert text.endswith("stacks: /runs/a/d/rank-N.stacks.txt")


def test_a_run_stands_still_where_no_rank_moves_or_one_cannot() -> None:
    assert not diagnose.stands_still(FOUR)
    assert not diagnose.stands_still([beat(0, still=60.0), beat(1)])
    assert diagnose.stands_still([beat(0, still=60.0), beat(1, still=60.0)])
    assert diagnose.stands_still([beat(0), beat(1, state=STOPPED)])
