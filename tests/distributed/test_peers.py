"""Ranks agree on a failure by two numbers, and send what they got to those that need it."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import torch.distributed as dist

from shardwright.train.loop.saving.peers import Peers, SaveFailed
from shardwright.train.process.leave import leave_process_group
from tests.distributed.wire import Wire, counted
from tests.fixtures import RanksOf

pytestmark = pytest.mark.distributed


def with_peers(ranks_of_a_node: int | None) -> dict[str, Any]:
    """Do each of what `Peers` does once; return what this rank got, and what it sent for it."""
    rank = int(os.environ["RANK"])
    if ranks_of_a_node is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks_of_a_node)
    dist.init_process_group("gloo")
    try:
        peers = Peers(rank, node_local=ranks_of_a_node is not None)
        found: dict[str, Any] = {"is_first": peers.is_first, "disk": (peers.disk, peers.disks)}
        wires: dict[str, Wire] = {}
        with counted() as wires["attempt"]:
            found["attempt"] = peers.attempt(lambda: rank)
        with counted() as wires["collect"]:
            found["collect"] = peers.collect(lambda: "a" * 1000 * rank)
        with counted() as wires["of_each_disk"]:
            found["of_each_disk"] = peers.of_each_disk(rank)
        found["wires"] = {name: (wire.sent, wire.received) for name, wire in wires.items()}
        found["failures"] = [_failure(peers, *failing) for failing in (((1,), ()), ((1,), (3,)))]
        found["after"] = peers.attempt(lambda: rank)
        return found
    finally:
        del peers
        leave_process_group()


def _failure(peers: Peers, full: tuple[int, ...], wrong: tuple[int, ...]) -> tuple[str, bool]:
    def act() -> None:
        if peers.rank in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "engine/shard")
        if peers.rank in wrong:
            raise ValueError("of a plan")

    try:
        peers.collect(act)
    except SaveFailed as failure:
        return str(failure), failure.is_of_disk
    raise AssertionError("not reached")


FAILURES = [
    ("rank 1: No space left on device: engine/shard", True),
    ("rank 1: No space left on device: engine/shard (and 1 more rank)", False),
]


def test_the_first_rank_gets_what_all_got_and_the_others_nothing(ranks: RanksOf) -> None:
    for rank, found in enumerate(ranks(4)(with_peers, None)):
        is_first = rank == 0
        assert found["is_first"] == is_first
        assert found["attempt"] == found["after"] == rank
        assert found["collect"] == (["a" * 1000 * n for n in range(4)] if is_first else [])
        assert found["of_each_disk"] == [rank]
        assert found["wires"] == {
            "attempt": (0, 0),
            "collect": (0, 3) if is_first else (1, 0),
            "of_each_disk": (0, 0),
        }
        assert found["failures"] == FAILURES


def test_the_first_rank_of_each_node_gets_what_those_of_its_node_got(ranks: RanksOf) -> None:
    for rank, found in enumerate(ranks(4)(with_peers, 2)):
        is_first = rank in (0, 2)
        assert found["is_first"] == is_first
        assert found["disk"] == (rank // 2, 2)
        mine = ["a" * 1000 * n for n in (rank, rank + 1)]
        assert found["collect"] == (mine if is_first else [])
        assert found["of_each_disk"] == [0, 2]
        assert found["wires"]["collect"] == ((0, 1) if is_first else (1, 0))
        assert found["failures"] == FAILURES


def test_a_rank_alone_is_all_there_is() -> None:
    peers = Peers(0)
    assert (peers.is_first, peers.attempt(lambda: 3), peers.collect(lambda: 4)) == (True, 3, [4])
    assert peers.of_each_disk("a") == ["a"]
    with pytest.raises(SaveFailed, match=r"rank 0:\nTraceback[\s\S]*IndexError"):
        peers.collect(lambda: [][0])
