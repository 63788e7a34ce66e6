"""Which rank is waited for, told from what ranks have shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from shardwright.train.diagnosis import stacks, verdict
from shardwright.train.diagnosis.beats import GONE, STOPPED, Beat
from shardwright.train.diagnosis.report import Report
from shardwright.train.process.collectives import reduced
from shardwright.train.process.heartbeat import Phase

LOADER = """\
Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/home/me/shardwright/train/process/heartbeat.py", line 290 in _answer

Current thread 0x00007f02 (most recent call first):
  File "/home/me/shardwright/train/data/batches/collator.py", line 88 in __call__
  File "/home/me/shardwright/train/loop/trainer.py", line 270 in _look_ahead
"""
MEETING = """\
Current thread 0x00007f02 (most recent call first):
  File "/home/me/shardwright/train/process/meeting.py", line 60 in wait_for
  File "/home/me/shardwright/train/process/agreement.py", line 51 in patiently
"""


def calls(
    last: int,
    operation: str = "all_reduce",
    *,
    group: str = "0",
    ranks: Sequence[int] = (0, 1, 2),
    sizes: Sequence[Sequence[int]] = ((5,),),
    waits: bool | None = None,
    started: bool = False,
) -> dict[str, Any]:
    """Return what a rank has called: all alike, and ``operation`` as the last."""
    called = [
        {
            "number": number,
            "backend": "gloo",
            "operation": "all_reduce" if number < last else operation,
            "sizes": [[5]] if number < last else [list(size) for size in sizes],
            "dtypes": ["Long"],
            "is_waited_for": waits if number == last else (None if waits is None else False),
            "is_started": started and number == last,
            "frames": [["/home/me/shardwright/train/loop/ahead.py", 62, "__init__"]],
        }
        for number in range(max(1, last - 3), last + 1)
    ]
    return {group: {"ranks": list(ranks), "called": called}}


def report(
    rank: int,
    collectives: Mapping[str, Any] | None,
    *,
    phase: Phase = Phase.COMPUTE,
    state: str = "S",
    text: str = LOADER,
    children: Mapping[str, str] | None = None,
) -> Report:
    found = Beat(rank, f"node{rank // 2}", 100 + rank, 9, 13, phase, 61.0, 1.0, 0.0, state=state)
    return Report(found, text, children or {}, collectives)


def test_the_rank_that_has_not_called_what_others_have() -> None:
    found = verdict.of(
        [report(0, calls(57)), report(1, calls(56), phase=Phase.DATA), report(2, calls(57))]
    )
    assert found.culprits == (1,)
    assert found.text == (
        "Rank 1 on node node0 never came: for 61 s it has been waiting for data of step 13, "
        "at train/data/batches/collator.py:88 in __call__. Ranks 0, 2 wait in all_reduce "
        "(number 57 of group 0, all_reduce of 5, at train/loop/ahead.py:62 in __init__)."
    )


def test_the_process_of_a_data_loader_is_shown_where_a_rank_waits_for_it() -> None:
    stuck = report(1, calls(56), phase=Phase.DATA, text=MEETING, children={"777": LOADER})
    found = verdict.of([report(0, calls(57)), stuck])
    assert "collator.py:88 in __call__ in process 777, which it waits for" in found.text


def test_of_two_groups_who_waits_in_one_is_not_waited_for_in_the_other() -> None:
    """Rank 1 waits for rank 2 within its group, and rank 0 for rank 1 in that of all."""
    pair = {"group": "1", "ranks": (1, 2)}
    found = verdict.of(
        [
            report(0, calls(10)),
            report(1, {**calls(9), **calls(5, **pair)}),  # type: ignore[arg-type]
            report(2, {**calls(9), **calls(4, **pair)}),  # type: ignore[arg-type]
        ]
    )
    assert found.culprits == (2,)
    assert "Rank 0 waits in all_reduce (number 10 of group 0" in found.text
    assert "Rank 1 waits in all_reduce (number 5 of group 1" in found.text


def test_ranks_in_different_collectives() -> None:
    found = verdict.of([report(0, calls(57)), report(1, calls(57, "broadcast"))])
    assert found.culprits == ()
    assert "as number 57 of group 0, rank 0 on node node0 calls all_reduce of 5" in found.text
    assert "and rank 1 on node node0 calls broadcast" in found.text
    found = verdict.of([report(0, calls(57)), report(1, calls(57, sizes=[[7]]))])
    assert "rank 0 on node node0 calls all_reduce of 5" in found.text
    assert "rank 1 on node node0 calls all_reduce of 7" in found.text


def test_a_stopped_process_cannot_show_itself() -> None:
    stopped = report(1, None, state=STOPPED, text="")
    found = verdict.of([report(0, calls(57)), stopped])
    assert found.culprits == (1,)
    assert "its process 101 is stopped by a signal (state T)." in found.text
    assert "the last collective that it has called is all_reduce of 5 (number 57" in found.text


def test_a_process_that_is_gone() -> None:
    found = verdict.of([report(0, calls(57)), report(1, None, state=GONE, text="")])
    assert found.culprits == (1,)
    assert "Rank 1 on node node0 is gone: process 101 was in the forward" in found.text


def test_an_interpreter_whose_lock_is_held() -> None:
    found = verdict.of([report(0, calls(57)), report(1, None)])
    assert found.culprits == (1,)
    assert "its interpreter does not answer, as something holds its lock" in found.text


def test_who_waits_in_the_store_is_not_waited_for() -> None:
    found = verdict.of([report(0, calls(57), text=MEETING), report(1, calls(57))])
    assert found.culprits == (1,)


def test_a_device_that_has_not_begun_what_others_have() -> None:
    """Of NCCL's collectives the hosts have called more than the devices have begun."""
    behind = calls(57, waits=True)
    found = verdict.of([report(0, calls(57, waits=True, started=True)), report(1, behind)])
    assert found.culprits == (1,)


def test_one_rank_alone() -> None:
    found = verdict.of([report(0, {}, phase=Phase.DATA)])
    assert found.culprits == (0,)
    assert "waiting for data of step 13, at train/data/batches/collator.py:88" in found.text


def test_nobody_stands_out() -> None:
    found = verdict.of([report(0, calls(57)), report(1, calls(57))])
    assert found.culprits == ()
    assert found.text.startswith("No rank stands out: all have called the same collectives.")


def test_a_node_that_shows_nothing() -> None:
    found = verdict.of([report(0, calls(57))], {"node7": 300.0})
    assert "Node node7 shows nothing: it was last heard of 5 min ago." in found.text


@pytest.mark.parametrize(
    ("ranks", "said"),
    [([3], "rank 3"), ([0, 1, 5], "ranks 0 and 1, 5"), ([0, 1, 2, 7], "ranks 0 to 2, 7")],
)
def test_ranks_in_words(ranks: list[int], said: str) -> None:
    assert verdict.ranks_said(ranks) == said


def test_the_main_thread_comes_last() -> None:
    frames = stacks.main_thread(LOADER)
    assert [frame.name for frame in frames] == ["__call__", "_look_ahead"]
    assert stacks.place(frames) == "at train/data/batches/collator.py:88 in __call__"
    assert stacks.place(stacks.main_thread("no stack")) is None


def test_what_torch_records_is_reduced_to_calls_by_group() -> None:
    """As torch 2.13 has it, where gloo's are over as soon as they are called."""
    entry = {
        "process_group": ("0", "default_pg"),
        "collective_seq_id": 4,
        "profiling_name": "gloo:all_reduce",
        "input_sizes": [[5]],
        "input_dtypes": ["Long"],
        "state": "scheduled",
        "retired": True,
        "is_p2p": False,
        "frames": [{"filename": "a.py", "line": 3, "name": "f"}],
    }
    send = {**entry, "is_p2p": True}
    nccl = {**entry, "profiling_name": "nccl:all_reduce", "retired": False, "state": "started"}
    found = reduced({"entries": [entry, send, nccl]}, {"0": [0, 1], "1": [0]})
    assert found["1"] == {"ranks": [0], "called": []}
    assert found["0"]["ranks"] == [0, 1]
    first, second = found["0"]["called"]
    assert (first["operation"], first["is_waited_for"], first["frames"]) == (
        "all_reduce",
        None,
        [["a.py", 3, "f"]],
    )
    assert (second["is_waited_for"], second["is_started"]) == (True, True)
