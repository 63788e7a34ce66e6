"""Which collectives this rank has called of late, as torch's flight recorder has them.

It is on of itself, for gloo as for NCCL, and keeps 2,000 (torch 2.13, TORCH_FR_BUFFER_SIZE). Of
gloo's it says when they were called only: it takes them for over at once (ProcessGroupGloo.cpp,
enqueue), and knows no ranks of a group.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any

LAST = 16
"""Of each group, in a report."""


def recorded() -> bytes:
    """Return what the flight recorder of this process holds, reduced, as JSON."""
    distributed = sys.modules.get("torch.distributed.distributed_c10d")
    if distributed is None:  # the rank still imports it
        return b"{}"
    import torch

    found = torch._C._distributed_c10d
    dump = getattr(found, "_dump_fr_trace", None)  # torch 2.11 has NCCL's alone
    dump = dump or getattr(found, "_dump_nccl_trace", None)
    world = distributed._world
    groups = {world.pg_names[group]: sorted(ranks) for group, ranks in world.pg_group_ranks.items()}
    return json.dumps(reduced(pickle.loads(dump()) if dump is not None else {}, groups)).encode()


def reduced(dumped: Mapping[str, Any], groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the ranks of each group, and the last collectives called in it, by number. Pure.

    ``groups`` are the ranks of each by its name.
    """
    called: dict[str, list[dict[str, Any]]] = {name: [] for name in groups}
    for entry in dumped.get("entries", ()):
        if not entry["is_p2p"]:
            called.setdefault(str(entry["process_group"][0]), []).append(_entry(entry))
    return {
        name: {"ranks": list(groups.get(name, ())), "called": entries[-LAST:]}
        for name, entries in called.items()
    }


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    backend, _, operation = str(entry["profiling_name"]).partition(":")
    is_waited_for = None
    if backend == "nccl":
        is_waited_for = not entry["retired"] and entry["state"] != "completed"
    return {
        "number": int(entry["collective_seq_id"]),
        "backend": backend,
        "operation": operation,
        "sizes": entry["input_sizes"],
        "dtypes": entry["input_dtypes"],
        "is_waited_for": is_waited_for,
        "is_started": entry["state"] == "started",
        "frames": [
            [frame["filename"], frame["line"], frame["name"]] for frame in entry.get("frames", ())
        ],
    }
