"""What the doctor's ranks measured, judged: devices and links against their own kind. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shardwright.launchers.machine.health import CLOCK_SKEW_SECONDS, Finding

SLOW_SHARE = 0.85
"""A device below this share of the median holds up all others noticeably."""
SLOW_LINK_SHARE = 0.5
"""Of what is usual: links share switches, and so differ more than devices do."""
SLOW_ANSWER = 4.0
"""Times what is usual, of four bytes."""
MOST_NAMED = 4

Pairs = Mapping[tuple[str, str], float]


def judge(measured: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Judge what the ranks measured, each a `Measured`; name what is slow."""
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for rank in measured:
        nodes.setdefault(rank["host"], []).append(rank)
    devices = ", ".join(dict.fromkeys(rank["device"] for rank in measured))
    yield Finding("ranks", "ok", f"{len(measured)} on {len(nodes)} node(s), {devices}")

    yield _of_products(nodes)
    for name, key in (("all-reduce", "all_reduce"), ("all-gather", "all_gather")):
        values = [rank[f"{key}_bytes_per_second"] for rank in measured]
        if None not in values:
            slowest = min(values)
            yield Finding(name, "ok", f"right, {slowest / 1e9:.2f} GB/s through each rank's link")
    latencies = [rank["small_all_reduce_seconds"] for rank in measured]
    if None not in latencies:
        yield Finding("latency", "ok", f"{1e6 * max(latencies):,.0f} us for an empty all-reduce")

    pairs = [pair for rank in measured for pair in rank["pairs"]]
    if pairs:
        yield from of_pairs(pairs)

    clocks = [rank["clock"] for rank in measured]
    skew = max(clocks) - min(clocks)
    if skew > CLOCK_SKEW_SECONDS:
        last = max(measured, key=lambda rank: rank["clock"])["host"]
        first = min(measured, key=lambda rank: rank["clock"])["host"]
        yield Finding(
            "clocks",
            "note",
            f"{last} is {skew:.1f} s ahead of {first}: times in their logs do not agree",
            "let chrony or ntpd set the clocks of all nodes",
        )
    elif len(nodes) > 1:
        yield Finding("clocks", "ok", f"all nodes agree within {skew:.2f} s")


def _of_products(nodes: Mapping[str, Sequence[Mapping[str, Any]]]) -> Finding:
    """Compare all devices with their median; a node whose devices are all slow is named as one."""
    topic, unit = "matrix product", "GFLOP/s a rank"
    ranks = [rank for each in nodes.values() for rank in each]
    middle = statistics.median(rank["matmul_flops"] for rank in ranks)
    slowest = min(ranks, key=lambda rank: rank["matmul_flops"])
    shown = f"{slowest['matmul_flops'] / 1e9:,.1f} {unit}"
    host = slowest["host"]
    where = f"rank {slowest['rank']} ({host}, its device {slowest['local_rank']})"
    if len(ranks) == 1:
        return Finding(topic, "ok", shown)
    if slowest["matmul_flops"] >= SLOW_SHARE * middle:
        return Finding(topic, "ok", f"{shown} on {where}, the slowest of {len(ranks)}")
    is_all = len(nodes) > 1 and all(r["matmul_flops"] < SLOW_SHARE * middle for r in nodes[host])
    share = f"{shown}, {slowest['matmul_flops'] / middle:.0%} of the median: it holds up all others"
    if is_all:
        remedy = f"see what else runs there, or leave it out (launcher=slurm: --exclude={host})"
        return Finding(topic, "note", f"{host} is the slowest with {share}", remedy)
    remedy = "see what else runs on it; on a GPU: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
    return Finding(topic, "note", f"{where} is the slowest with {share}", remedy)


def of_pairs(pairs: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Judge what pairs of nodes measured, each a `Pair`; name the slow link, or the slow node."""
    yield _of_links({tuple(pair["nodes"]): pair["bytes_per_second"] for pair in pairs})
    yield _of_answers({tuple(pair["nodes"]): pair["seconds"] for pair in pairs})


def _of_links(speeds: Pairs) -> Finding:
    usual = usual_of(speeds, max)
    slow = {pair: speed for pair, speed in speeds.items() if speed < SLOW_LINK_SHARE * usual}
    slowest = min(speeds, key=lambda pair: speeds[pair])
    if not slow:
        text = f"{speeds[slowest] / 1e9:,.2f} GB/s between {_named(slowest)}, the slowest of "
        return Finding("links", "ok", f"{text}{len(speeds)}; usual {usual / 1e9:,.2f} GB/s")
    text = _listed(slow, speeds, lambda speed: f"{speed / 1e9:,.2f} GB/s")
    return Finding(
        "links",
        "note",
        f"{text}; usual among the {len(speeds)} pairs of nodes: {usual / 1e9:,.2f} GB/s",
        "look at the cable, the switch and the interface that is used",
    )


def _of_answers(seconds: Pairs) -> Finding:
    usual = usual_of(seconds, min)
    slow = {pair: each for pair, each in seconds.items() if each > SLOW_ANSWER * usual}
    if not slow:
        worst = max(seconds, key=lambda pair: seconds[pair])
        return Finding(
            "answers", "ok", f"{1e6 * seconds[worst]:,.0f} us between {_named(worst)}, the slowest"
        )
    text = _listed(slow, seconds, lambda each: f"{1e6 * each:,.0f} us")
    return Finding(
        "answers",
        "note",
        f"{text}; usual: {1e6 * usual:,.0f} us",
        "look at the way between them: switches, other traffic, power saving of interfaces",
    )


def usual_of(pairs: Pairs, best: Callable[[Sequence[float]], float]) -> float:
    """Return what the median node reaches with the peer with whom it does best.

    Of few nodes a single slow one has most of the pairs, and so their median.
    """
    nodes = dict.fromkeys(node for pair in pairs for node in pair)
    return statistics.median(best([pairs[p] for p in pairs if node in p]) for node in nodes)


def slow_nodes(slow: Pairs, all_pairs: Pairs) -> list[str]:
    """Return the nodes with whom every pair is slow, where others have pairs that are not.

    Then the node's own interface is what they have in common, and not the links one by one.
    """
    nodes = list(dict.fromkeys(node for pair in all_pairs for node in pair))
    if len(nodes) < 3 or len(slow) == len(all_pairs):
        return []
    return [node for node in nodes if all(pair in slow for pair in all_pairs if node in pair)]


def _listed(slow: Pairs, all_pairs: Pairs, said: Callable[[float], str]) -> str:
    """Return which nodes, or else which links, are slow, the slowest of them first."""
    nodes = slow_nodes(slow, all_pairs)
    rest = [pair for pair in slow if not any(node in nodes for node in pair)]
    rest.sort(
        key=lambda pair: abs(slow[pair] - statistics.median(all_pairs.values())), reverse=True
    )
    parts = []
    for node in nodes:
        of_node = statistics.median(slow[pair] for pair in slow if node in pair)
        parts.append(f"{node} is slow to every other node ({said(of_node)})")
    parts += [f"{_named(pair)}: {said(slow[pair])}" for pair in rest[:MOST_NAMED]]
    if len(rest) > MOST_NAMED:
        parts.append(f"{len(rest) - MOST_NAMED} more")
    return ", ".join(parts)


def _named(pair: tuple[str, str]) -> str:
    return f"{pair[0]} and {pair[1]}"
