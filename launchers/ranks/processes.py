"""The processes of a run on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from train.process.arguments import decoded


def rank_processes(run_dir: Path) -> list[int]:
    """Return the processes of this machine that are ranks of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        # torchrun has the same words, further behind.
        for start in (1, 2):
            if words[start : start + 2] == [b"-m", b"train"]:
                arguments = words[start + 2 : start + 3]
            elif words[start : start + 1] and words[start].endswith(b"/train/__main__.py"):
                arguments = words[start + 1 : start + 2]  # as srun starts it for DeepSpeed
            else:
                continue
            if _is_path(arguments, run_dir):
                found.append(int(path.parent.name))
    return found


def _is_path(words: Sequence[bytes], run_dir: Path) -> bool:
    """Return whether a rank's only argument is the run's directory, plain or encoded."""
    try:
        return [decoded(os.fsdecode(word)) for word in words] == [str(run_dir)]
    except ValueError:  # another program's argument that begins as one that is encoded
        return False
