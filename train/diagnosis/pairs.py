"""How fast every two nodes exchange tensors: in rounds, in each of which all have a peer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

REPEATS = 3
SMALL_REPEATS = 20


@dataclass(frozen=True)
class Pair:
    """What the first ranks of two nodes measured between them."""

    nodes: tuple[str, str]
    bytes_per_second: float
    """There and back, as long as other pairs do the same."""
    seconds: float
    """Of four bytes in one direction."""


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return rounds in which everybody of so many meets everybody else once. Pure.

    The circle method of tournaments: as few rounds as can be, and of an odd number one rests in
    each.
    """
    circle = list(range(count)) + [-1] * (count % 2)
    half = len(circle) // 2
    found = []
    for _ in range(len(circle) - 1):
        met = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in met if -1 not in pair])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found if count > 1 else []


def measure(
    hosts: Sequence[str],
    elements: int,
    device: torch.device,
    before: Callable[[str, str], object] = lambda here, there: None,
) -> list[Pair]:
    """Return what this rank measured of pairs in which its node is the first. Collective.

    ``hosts`` are those of all ranks, of which each node's first one takes part. ``before`` is
    called with both nodes, of which the first has the lower rank, before each exchange.
    """
    nodes = list(dict.fromkeys(hosts))
    firsts = [hosts.index(node) for node in nodes]
    rank, found = dist.get_rank(), []
    large = torch.zeros(elements, device=device)
    for meeting in rounds(len(nodes)):
        for one, other in meeting:
            if rank not in (firsts[one], firsts[other]):
                continue
            is_first = rank == firsts[one]
            peer = firsts[other if is_first else one]

            def begin(one: int = one, other: int = other) -> object:
                return before(nodes[one], nodes[other])

            arrived = _exchange(large, peer, is_first, REPEATS, begin)
            answered = _exchange(large[:1], peer, is_first, SMALL_REPEATS, begin)
            if is_first:
                speed = 2 * large.nbytes / arrived
                found.append(Pair((nodes[one], nodes[other]), speed, answered / 2))
        dist.barrier()
    return found


def _exchange(
    tensor: torch.Tensor, peer: int, is_first: bool, repeats: int, before: Callable[[], object]
) -> float:
    """Send a tensor there and have it back; return the median time of it, after one that warms up.

    The answer has come when the time is taken, on a GPU too.
    """
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        before()
        for sends in (is_first, not is_first):
            if sends:
                dist.send(tensor, peer)
            else:
                dist.recv(tensor, peer)
        if tensor.device.type == "cuda":
            torch.cuda.synchronize(tensor.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
