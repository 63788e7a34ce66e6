"""What a hostfile is divided into: slots of its hosts, which DeepSpeed's command reaches by ssh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwright.launchers.machine import hostfile
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.locally import Slot
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute


def slots(config: SweepConfig, path: Path, launcher: Any, ranks: int | None) -> list[Slot]:
    """Return the parts of a hostfile's hosts that points run on, one after the other host's first.

    ``launcher`` is the section that names the hostfile. A point is on one host.
    """
    name = f"launcher.hostfile={path}"
    try:
        text = Path(absolute(str(path))).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{name} cannot be read ({reason}); give a file with lines of: host slots=8"
        ) from None
    found = hostfile.hosts(text, launcher.include, launcher.exclude, name)
    return divided(config, found, ranks)


def divided(config: SweepConfig, found: dict[str, list[int]], ranks: int | None) -> list[Slot]:
    """Return the slots of hosts in groups, the first of each host before the second. Pure."""
    size = config.devices_per_point if config.devices_per_point != "auto" else ranks
    fewest = min(map(len, found.values()))
    if size is None:
        size = fewest
    if size > fewest:
        raise UserError(
            f"a point with {size} slots is on one host, and a host of the hostfile has {fewest}; "
            "lower sweep.devices_per_point or launcher.nproc_per_node"
        )
    groups = [
        (n, host, numbers[n * size : (n + 1) * size])
        for host, numbers in found.items()
        for n in range(len(numbers) // size)
    ]
    made = [_slot(host, own) for _, host, own in sorted(groups, key=lambda group: group[0])]
    if config.max_parallel == "auto":
        return made
    if config.max_parallel > len(made):
        raise UserError(
            f"sweep.max_parallel={config.max_parallel} is more than the {len(made)} point(s) that "
            "the hostfile has room for; lower it, or sweep.devices_per_point"
        )
    return made[: config.max_parallel]


def _slot(host: str, numbers: list[int]) -> Slot:
    listed = ",".join(map(str, numbers))
    words = (f"launcher.include='{host}:{listed}'", "launcher.exclude=null")
    return Slot(f"{host}:{listed}", words=words)
