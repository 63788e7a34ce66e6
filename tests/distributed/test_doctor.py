"""What the doctor's ranks measure among several nodes."""

from __future__ import annotations

import dataclasses
import socket
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from shardwright.launchers.machine import among_ranks
from shardwright.train import config as run_config
from shardwright.train.diagnosis import doctor, pairs
from shardwright.train.process.agreement import from_all
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.strategy.group import join
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed


def measure_as_a_node_of_its_own(run_dir: Path) -> list[doctor.Measured]:
    """One machine has one name: that the ranks lie on two is all that is made up here."""
    rank = rank_from_environment()
    name, socket.gethostname = socket.gethostname, lambda: f"node{rank.index}"
    try:
        config = run_config.load(run_dir)
        with join(config, rank):
            return doctor.measure(config, with_speeds=True)
    finally:
        socket.gethostname = name


def pairs_with_a_slow_link(run_dir: Path) -> list[dict[str, Any]]:
    """Measure on four nodes, of which the second and the fourth are slow with each other.

    All links take their time, so that a busy machine's own moments do not count beside it.
    """

    def wait(one: str, other: str) -> None:
        time.sleep(0.5 if (one, other) == ("node1", "node3") else 0.05)

    rank, hosts = rank_from_environment(), [f"node{number}" for number in range(4)]
    with (
        mock.patch.object(pairs, "SMALL_REPEATS", 3),
        join(run_config.load(run_dir), rank),
    ):
        found = pairs.measure(hosts, 2**12, torch.device("cpu"), wait)
        return [pair for of_rank in from_all(found) for pair in map(dataclasses.asdict, of_rank)]


def test_every_two_nodes_measure_their_link_and_the_slow_one_is_named(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["launcher"]["nproc_per_node"] = 4
    first, *others = ranks(4)(pairs_with_a_slow_link, frozen_run(tree))
    assert all(other == first for other in others), "all ranks know the same"
    assert sorted(pair["nodes"] for pair in first) == [
        (f"node{one}", f"node{other}") for one in range(4) for other in range(one + 1, 4)
    ]
    for found in among_ranks.of_pairs(first):
        assert found.state == "note"
        assert found.text.startswith("node1 and node3: ")


def test_the_doctors_ranks_measure_pairs(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    first, second = ranks(2)(measure_as_a_node_of_its_own, frozen_run(tiny_tree("clm")))
    assert first == second, "all ranks know the same"
    (pair,) = first[0].pairs
    assert pair.nodes == ("node0", "node1")
    assert min(pair.bytes_per_second, pair.seconds) > 0
    assert first[1].pairs == ()


@pytest.mark.parametrize("count", range(10))
def test_everybody_meets_everybody_once_in_as_few_rounds_as_can_be(count: int) -> None:
    rounds = pairs.rounds(count)
    assert sorted(pair for meeting in rounds for pair in meeting) == [
        (one, other) for one in range(count) for other in range(one + 1, count)
    ]
    for meeting in rounds:
        busy = [node for pair in meeting for node in pair]
        assert len(set(busy)) == len(busy) == count - count % 2
    assert len(rounds) == (0 if count < 2 else count - 1 + count % 2)


def test_a_wrong_value_stops_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    with pytest.raises(RuntimeError, match=r"all-reduce .* gave 1 wrong values on node7"):
        doctor._expect(torch.tensor([3.0, 4.0]), 3.0, "all-reduce")
