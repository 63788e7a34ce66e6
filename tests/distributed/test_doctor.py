"""What the doctor's ranks measure among several nodes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from shardwright.train import config as run_config
from shardwright.train.diagnosis import doctor
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


def test_every_node_measures_its_link_to_the_next(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    first, second = ranks(2)(measure_as_a_node_of_its_own, frozen_run(tiny_tree("clm")))
    assert first == second, "all ranks know the same"
    assert [(m.rank, m.host, m.next_node) for m in first] == [
        (0, "node0", "node1"),
        (1, "node1", "node0"),
    ]
    assert all(m.link_bytes_per_second and m.link_bytes_per_second > 0 for m in first)
    for measured in first:
        speeds = measured.speeds
        assert speeds is not None
        assert set(speeds.training) == {"fp32", "bf16"}
        assert min([*speeds.training.values(), speeds.memory]) > 0
        assert speeds.host_link is None, "there is no device behind one"


def test_a_wrong_value_stops_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    with pytest.raises(RuntimeError, match=r"all-reduce .* gave 1 wrong values on node7"):
        doctor._expect(torch.tensor([3.0, 4.0]), 3.0, "all-reduce")
