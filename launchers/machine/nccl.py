"""What NCCL says in its log of the machine it found and the ways that it chose. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from shardwright.launchers.machine.health import Finding

# Source: NCCL 2.27, src/debug.cc (host:pid:tid [device] NCCL INFO text).
_LINE = re.compile(r"^(?P<host>\S+?):\d+:\d+ \[-?\d+\] (?:\S+ )?NCCL (?P<level>\w+) (?P<text>.*)$")
# src/transport/*.cc: Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM, or "[send] via NET/IB/0".
_CHANNEL = re.compile(
    r"Channel \d+(?:/\d+)? : \d+\[\w+\] -> \d+\[\w+\] (?:\[(?:send|receive)\] )?via (?P<way>\S+)"
)
# src/transport/net_*.cc and plugin/net.cc.
_NETWORK = re.compile(r"Using network (?P<name>\S+)")
_VERSION = re.compile(r"NCCL version (?P<version>\S+)")
_SET = re.compile(r"(?P<name>NCCL_\w+) set (?:by environment )?to (?P<value>\S+)")
# src/graph/topo.cc prints the tree of the system between two such lines.
_SYSTEM = re.compile(r"=== System : maxBw (?P<most>[\d.]+) totalBw (?P<whole>[\d.]+) ===")
_END = re.compile(r"=+$")


@dataclass
class Said:
    """What the processes of a job have said."""

    version: str | None = None
    networks: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    """How often a channel between two ranks goes a way: P2P, SHM, NET and the like."""
    variables: dict[str, str] = field(default_factory=dict)
    topology: tuple[str, ...] = ()
    """The tree of the first system that was printed."""
    warnings: tuple[str, ...] = ()


def read(texts: Iterable[str]) -> Said:
    """Return what logs say, one for each process; lines of another form are passed over."""
    said = Said()
    warnings: dict[str, None] = {}
    for text in texts:
        _read(text, said, warnings)
    said.warnings = tuple(warnings)
    return said


def _read(text: str, said: Said, warnings: dict[str, None]) -> None:
    tree: list[str] | None = None
    for line in text.splitlines():
        if (whole := _VERSION.search(line)) and said.version is None:
            said.version = whole["version"]
        if (parts := _LINE.match(line)) is None:
            continue
        told = parts["text"].rstrip()
        if parts["level"] == "WARN":
            warnings[f"{parts['host']}: {told}"] = None
        elif system := _SYSTEM.search(told):
            tree = [f"fastest link {system['most']} GB/s, all of a GPU {system['whole']} GB/s"]
        elif tree is not None:
            if _END.fullmatch(told):
                said.topology = said.topology or tuple(tree)
                tree = None
            else:
                tree.append(told)
        elif channel := _CHANNEL.search(told):
            said.ways[channel["way"]] += 1
        elif network := _NETWORK.search(told):
            said.networks[network["name"]] += 1
        elif variable := _SET.search(told):
            said.variables[variable["name"]] = variable["value"].rstrip(".")


def judge(said: Said, nodes: int) -> Iterator[Finding]:
    """Judge what NCCL found and chose for ranks on so many nodes."""
    if said.version is None and not said.ways:
        yield Finding("NCCL", "note", "it has left no log of what it found and chose")
        return
    networks = ", ".join(said.networks) or "no network"
    yield Finding("NCCL", "ok", f"{said.version or 'of unknown version'}, network: {networks}")
    if said.variables:
        shown = " ".join(f"{name}={value}" for name, value in sorted(said.variables.items()))
        yield Finding("NCCL variables", "ok", shown)
    if said.ways:
        ways = ", ".join(f"{count} over {way}" for way, count in said.ways.most_common())
        if nodes > 1 and set(said.networks) == {"Socket"}:
            yield Finding(
                "NCCL channels",
                "note",
                f"{ways}: nodes exchange tensors over TCP",
                "where there is InfiniBand or RoCE: ibv_devinfo has to show its ports, to "
                "containers too; NCCL_IB_HCA names them, and NCCL_SOCKET_IFNAME the interface",
            )
        else:
            yield Finding("NCCL channels", "ok", ways)
    for warning in said.warnings:
        yield Finding("NCCL", "note", warning, "look the warning up in NCCL's troubleshooting")
