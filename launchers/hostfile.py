"""DeepSpeed's hostfile and its filters: which slots of which hosts a run takes. Pure."""

from __future__ import annotations

import re

from train.errors import UserError

# As deepspeed/launcher/runner.py (0.19.8) reads them.
_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


def hosts(
    text: str, include: str | None = None, exclude: str | None = None
) -> dict[str, list[int]]:
    """Return the chosen slots of each host, in the file's order.

    Raises UserError where a line, a host or a slot is not what the filters need.
    """
    found: dict[str, list[int]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f"launcher.hostfile: line {number} is {line!r}; write each as: host slots=8"
            )
        if match[1] in found:
            raise UserError(f"launcher.hostfile: {match[1]} stands there twice; write it once")
        found[match[1]] = list(range(int(match[2])))
    if not found:
        raise UserError("launcher.hostfile names no host; write lines of: host slots=8")
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


def ranks_per_node(chosen: dict[str, list[int]]) -> int:
    """Return the number of slots that every host has. Raises UserError where they differ."""
    counts = {host: len(slots) for host, slots in chosen.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{host} {count}" for host, count in counts.items())
        raise UserError(
            f"launcher.hostfile gives its hosts different numbers of slots ({listed}), and a batch "
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
