"""The processes of a run on this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from shardwright.train.process.arguments import decoded


def rank_processes(run_dir: Path) -> list[int]:
    """Return the processes of this machine that are ranks of a run."""
    return all_rank_processes().get(str(run_dir), [])


def all_rank_processes() -> dict[str, list[int]]:
    """Return the processes of this machine that are ranks, by the directory of their run."""
    found: dict[str, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        # torchrun has the same words, further behind.
        for start in (1, 2):
            match words[start : start + 3]:
                # By its older name, scripts of older jobs and people in a checkout start it.
                case [b"-m", b"shardwright.train" | b"train", argument]:
                    pass
                case [program, argument, *_] if program.endswith(b"/train/__main__.py"):
                    pass  # as srun starts it for DeepSpeed
                case _:
                    continue
            with suppress(ValueError):  # another program's argument that begins as an encoded one
                found.setdefault(decoded(os.fsdecode(argument)), []).append(int(path.parent.name))
    return found
