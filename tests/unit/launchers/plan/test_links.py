"""How long collectives take, in numbers worked out by hand."""

from __future__ import annotations

import pytest

from shardwright.launchers.plan.hardware import Hardware, chosen
from shardwright.launchers.plan.links import bandwidth, seconds
from shardwright.train.plan.traffic import Group

MICROSECOND = 1e-6


def hardware(*words: str) -> Hardware:
    found = chosen(["hardware=h200x8", "hardware.link_efficiency=1", *words])
    assert found is not None
    return found


def test_a_large_ring_within_a_node_is_bytes_over_nvlink() -> None:
    # 8 ranks pass 7/8 of 450 GB at 450 GB/s; the seven hops are microseconds.
    size = 450e9
    for name, times in (("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)):
        spent = seconds(name, Group(8, 8), size, 1, hardware())  # type: ignore[arg-type]
        assert spent == pytest.approx(times * 7 / 8, rel=1e-3)


def test_several_nodes_share_their_ranks_links_to_the_network() -> None:
    assert bandwidth(Group(16, 8), hardware()) == 8 * 50e9
    assert bandwidth(Group(2, 1), hardware()) == 50e9
    assert bandwidth(Group(8, 8), hardware("hardware.link_efficiency=0.5")) == 225e9
    assert bandwidth(Group(8, 8), hardware("hardware.nvlink_gb_per_second=null")) == 64e9
    fast = hardware("hardware.network_gb_per_second=100")
    assert bandwidth(Group(16, 8), fast) == 450e9, "no more than NVLink gives"


def test_small_pieces_cost_their_hops() -> None:
    # LL in a ring over 4,096 ranks: 511 hops between nodes of 2.7 us, 3,584 within of 0.47 us.
    spent = seconds("all-gather", Group(4096, 8), 4096, 1, hardware())
    assert spent == pytest.approx((3.6 + 511 * 2.7 + 3584 * 0.47) * MICROSECOND, rel=1e-3)
    # A tree has a logarithm of them: 2 x (7 x 0.52 + 9 x 5.0).
    reduced = seconds("all-reduce", Group(4096, 8), 4096, 1, hardware())
    assert reduced == pytest.approx((4.4 + 2 * (7 * 0.52 + 9 * 5.0)) * MICROSECOND, rel=1e-3)
    assert seconds("all-gather", Group(4096, 8), 4096 * 100, 100, hardware()) == pytest.approx(
        100 * spent
    )


def test_one_rank_sends_nothing() -> None:
    assert seconds("all-reduce", Group(1, 1), 10**12, 5, hardware()) == 0
    assert seconds("all-gather", Group(8, 8), 0, 0, hardware()) == 0


def test_cards_without_nvlink_and_cpus_have_their_own_hops() -> None:
    cards = hardware("hardware.nvlink_gb_per_second=null")
    # LL's start and its seven hops over PCIe, with its quarter of the bandwidth.
    spent = seconds("all-gather", Group(8, 8), 8, 1, cards)
    assert spent == pytest.approx((3.6 + 7 * 1.0) * MICROSECOND, rel=1e-3)
    cpus = chosen(["hardware=cpux4"])
    assert cpus is not None
    sockets = seconds("all-gather", Group(4, 4), 4, 1, cpus)
    assert sockets == pytest.approx((50 + 3 * 50) * MICROSECOND, rel=1e-3)


def test_what_all_send_to_all_goes_over_each_ranks_own_link() -> None:
    spent = seconds("all-to-all", Group(16, 8), 50e9, 1, hardware())
    assert spent == pytest.approx(15 / 16, rel=1e-3)
