"""DeepSpeed's hostfile and its filters: which slots of which hosts a run takes. Pure."""

from __future__ import annotations

import re

from shardwright.train.errors import UserError

# As deepspeed/launcher/runner.py (0.19.8) reads them.
_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


_HOST = re.compile(r"[A-Za-z0-9._:-]+")
_BYTE_ORDER_MARK = "\ufeff"
NAME = "launcher.hostfile"


def hosts(
    text: str, include: str | None = None, exclude: str | None = None, name: str = NAME
) -> dict[str, list[int]]:
    """Return the chosen slots of each host, in the file's order; ``name`` is how to call the file.

    Raises UserError where a line, a host or a slot is not what the filters need.
    """
    if text.startswith(_BYTE_ORDER_MARK):
        raise UserError(
            f"{name}: line 1 begins with a byte-order mark, which DeepSpeed takes for a part of "
            "the first host's name; save the file as UTF-8 without one"
        )
    found: dict[str, list[int]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{name}: line {number} is {line!r}; write each as: host slots=8")
        where = f"{name}: line {number}, {line!r}"
        user, at, host = match[1].rpartition("@")
        if at and _HOST.fullmatch(host):
            raise UserError(
                f"{where}, names a user, but the ranks' rendezvous needs a name or address "
                f"alone; write {host} there, and the user into ~/.ssh/config (Host {host}, User "
                f"{user})"
            )
        if not _HOST.fullmatch(match[1]):
            raise UserError(
                f"{where}: {match[1]!r} is neither a host's name nor an address; write letters, "
                "digits and . _ : - only, as in: host slots=8"
            )
        if int(match[2]) == 0:
            raise UserError(
                f"{where}, gives no slot; write how many ranks it starts, at least 1, or leave "
                "the line out"
            )
        if match[1] in found:
            raise UserError(f"{where}: {match[1]} is listed twice; list it once")
        found[match[1]] = list(range(int(match[2])))
    if not found:
        raise UserError(f"{name} names no host; write lines of: host slots=8")
    if include is not None:
        chosen = _filter("include", include, found)
        return {host: chosen[host] or slots for host, slots in found.items() if host in chosen}
    if exclude is not None:
        dropped = _filter("exclude", exclude, found)
        left = {
            host: [slot for slot in slots if slot not in (dropped.get(host) or [])]
            for host, slots in found.items()
            if dropped.get(host) != []
        }
        if not any(left.values()):
            raise UserError(f"launcher.exclude={exclude} leaves no slot of the hostfile")
        return {host: slots for host, slots in left.items() if slots}
    return found


def ranks_per_node(chosen: dict[str, list[int]], name: str = NAME) -> int:
    """Return the number of slots that every host has. Raises UserError where they differ."""
    counts = {host: len(slots) for host, slots in chosen.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{host} {count}" for host, count in counts.items())
        raise UserError(
            f"{name} gives its hosts different numbers of slots ({listed}), and a batch "
            "is divided evenly; choose as many of each with launcher.include"
        )
    return next(iter(counts.values()))


def _filter(name: str, value: str, known: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the named slots by host; an empty list stands for all of a host."""
    found: dict[str, list[int]] = {}
    for part in value.split("@"):
        host, _, slots = part.partition(":")
        if host not in known:
            raise UserError(
                f"launcher.{name}={value}: {host!r} is not in the hostfile, which has "
                f"{', '.join(known)}"
            )
        if slots and not re.fullmatch(r"\d+(,\d+)*", slots):
            raise UserError(f"launcher.{name}={value}: write slots as {host}:0,1")
        numbers = sorted({int(slot) for slot in slots.split(",")}) if slots else []
        if unknown := [slot for slot in numbers if slot not in known[host]]:
            raise UserError(
                f"launcher.{name}={value}: {host} has {len(known[host])} slots, from 0 on, and no "
                f"{unknown[0]}"
            )
        found[host] = numbers
    return found
