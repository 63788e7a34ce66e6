"""`hardware=here`: this machine, measured by the doctor's ranks once, and kept in a file."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers.commands import doctor
from shardwright.launchers.machine import health, names
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan import hardware, kept
from shardwright.launchers.plan.hardware import GROUP, Hardware
from shardwright.train.console import progress
from shardwright.train.durable import write_text
from shardwright.train.errors import UserError
from shardwright.train.units import counted

AGAIN = "--measure"
"""The flag that asks for it once more."""
_WORD = re.compile(rf"{GROUP}={kept.HERE}(?:x(\d+)(?:x(\d+))?)?")


def chosen(
    words: Sequence[str], config_dir: Path | None, here: Machine, *, again: bool = False
) -> Hardware | None:
    """Return the hardware that words of a command line ask for, this machine's among it.

    It is measured where it has not been, where it is another than it was, or ``again``. Raises
    UserError on whatever there is not, or cannot be.
    """
    named = [word for word in words if word.startswith(f"{GROUP}=")]
    asked = _WORD.fullmatch(named[-1]) if named else None
    if asked is None:
        if again:
            raise UserError(f"{AGAIN} measures this machine, for {GROUP}={kept.HERE}; add that")
        return hardware.chosen(words, config_dir)
    counts = [None if text is None else int(text) for text in asked.groups()]
    if 0 in counts:
        raise UserError(f"{asked[0]}: devices and nodes are counted from 1")
    device = kept.device_of(here)
    found = None if again else kept.matching(here, device)
    if found is None:
        found = _measured(here, device)
    else:
        print(f"{GROUP}={kept.HERE} is {kept.place(device)}", file=sys.stderr)
    ranks, nodes = counts
    sizes = {"devices": ranks or found.devices, "nodes": nodes or 1}
    tree = kept.shared(found, sizes["devices"]).model_dump()
    return hardware.with_keys(tree | sizes, words)


def _measured(here: Machine, device: str) -> Hardware:
    """Measure this machine, with a rank for each GPU or two that share the cores; keep it."""
    ranks = here.gpus if device == "cuda" else min(2, here.cores)
    place = Path(tempfile.gettempdir()) / time.strftime("shardwright-measure-%Y%m%d-%H%M%S")
    words = ("launcher=torchrun", f"launcher.device={device}", f"launcher.nproc_per_node={ranks}")
    config = doctor.asked_for(words, here, names.free(place))
    with progress.phase(f"measuring this machine on {counted(ranks, 'rank')}", console=sys.stderr):
        among_ranks = doctor.measured(config, here, with_speeds=True).ranks
        disk = _disk(Path.cwd())
    found = kept.measured(among_ranks, here, disk)
    path = kept.place(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, kept.text(found, here, time.strftime("%Y-%m-%dT%H:%M:%S")))
    except OSError as error:
        raise UserError(
            f"what was measured cannot be kept in {path} ({error.strerror}); set XDG_CACHE_HOME to "
            "a directory that you may write to"
        ) from None
    print(f"measured this machine, kept in {path}: once more with {AGAIN}", file=sys.stderr)
    return found


def _disk(place: Path) -> dict[str, float]:
    try:
        written, read, _ = health.timed(place, health.PROBE_BYTES)
    except OSError as error:
        raise UserError(
            f"{place} is not writable ({error.strerror}), so that its disk cannot be measured; go "
            "where your runs are to be"
        ) from None
    return {"free": shutil.disk_usage(place).free, "bytes_per_second": min(written, read)}
