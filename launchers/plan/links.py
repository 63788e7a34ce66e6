"""How long a collective takes on some hardware: bytes over bandwidth, and a time for each hop.

Source of both: NCCL, src/graph/tuning.cc, the model by which it chooses among its algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shardwright.launchers.plan.hardware import GIGA, Hardware
from shardwright.train.plan.traffic import CollectiveName, Group, sent_bytes

MICROSECOND = 1e-6


@dataclass(frozen=True)
class _Protocol:
    """One of NCCL's: what it makes of a link, and what it costs to start and for each hop."""

    share: float
    """Of the bandwidth."""
    start: float
    nvlink: float
    pcie: float
    network: float


# ncclTopoTuneModel: baseLat and hwLat, in microseconds, with the shares of the bandwidth that it
# gives each protocol: LL, LL128 (over NVLink alone) and Simple.
_RINGS = (
    _Protocol(1 / 4, 3.6, 0.47, 1.0, 2.7),
    _Protocol(0.92, 10.0, 1.9, math.inf, 4.0),
    _Protocol(1.0, 8.4, 3.4, 5.7, 9.6),
)
_TREES = (
    _Protocol(0.9 / 3.8, 4.4, 0.52, 1.0, 5.0),
    _Protocol(0.9 * 0.915, 4.4, 1.2, math.inf, 8.5),
)
_GLOO = _Protocol(1.0, 50.0, 50.0, 50.0, 100.0)
"""Assumed: gloo, over sockets."""


def seconds(
    name: CollectiveName, group: Group, size_bytes: float, calls: int, hardware: Hardware
) -> float:
    """Return the time of so many equal collectives. Pure.

    ``size_bytes`` is what all of them have together: the larger of what goes in and comes out.
    """
    if group.ranks == 1 or not calls:
        return 0.0
    return calls * min(_of_one(name, group, size_bytes / calls, hardware))


def bandwidth(group: Group, hardware: Hardware) -> float:
    """Return at how many bytes a second a rank sends in rings, the links' efficiency included.

    Rings enter and leave a node once for all of its ranks, each over the network of another device:
    together they have those of all of its ranks in the group, and no more than the links within.
    """
    within = hardware.nvlink_gb_per_second or hardware.host_link_gb_per_second
    if group.nodes > 1:
        network = group.per_node * hardware.network_gb_per_second
        within = network if group.per_node == 1 else min(within, network)
    return within * GIGA * hardware.link_efficiency


def _of_one(
    name: CollectiveName, group: Group, size_bytes: float, hardware: Hardware
) -> Iterator[float]:
    """Yield the time of one collective by each way to do it.

    A ring of n ranks has n - 1 hops, twice for a reduction that all get. Trees take as many hops as
    a node's ranks and the logarithm of the nodes.
    """
    ranks, nodes = group.ranks, group.nodes
    times = 2 if name == "all-reduce" else 1
    sent = sent_bytes(name, group, size_bytes)
    speed = bandwidth(group, hardware)
    if name == "all-to-all":  # each rank sends to each, over its own link to the network
        if nodes > 1:
            speed = hardware.network_gb_per_second * GIGA * hardware.link_efficiency
        protocol = _GLOO if hardware.device == "cpu" else _RINGS[-1]
        yield sent / speed + _hops(protocol, 0, 1, hardware)
        return
    between = times * (nodes - 1)
    for protocol in (_GLOO,) if hardware.device == "cpu" else _RINGS:
        hops = _hops(protocol, times * (ranks - 1) - between, between, hardware)
        yield sent / (speed * protocol.share) + hops
    if name == "all-reduce" and hardware.device == "cuda":
        for protocol in _TREES:
            hops = _hops(protocol, 2 * (group.per_node - 1), 2 * math.log2(nodes), hardware)
            yield 2 * size_bytes / (speed * protocol.share) + hops


def _hops(protocol: _Protocol, within: float, between: float, hardware: Hardware) -> float:
    """Return the seconds of a start and so many hops within nodes and between them."""
    each = protocol.nvlink if hardware.nvlink_gb_per_second else protocol.pcie
    if each == math.inf:  # not over such links
        return math.inf
    return MICROSECOND * (protocol.start + within * each + between * protocol.network)
