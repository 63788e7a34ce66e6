"""One way to read a checkpoint, whichever engine wrote it: by parameter name, in slices."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint import read_dcp, read_zero
from train.checkpoint.lazy import PortableState, Unreadable

ENGINE = "engine"
"""The folder of a checkpoint that holds the engine's own files."""


def read(checkpoint: Path) -> PortableState:
    """Return the state in a checkpoint directory, or in an engine's folder; reads no tensor yet.

    What it is, the files say and nothing else. Raises Unreadable naming what was looked for.
    """
    for directory in (checkpoint / ENGINE, checkpoint):
        if (directory / read_dcp.METADATA).is_file():
            return read_dcp.read(directory)
        if read_zero.is_zero(directory):
            return read_zero.read(directory)
    raise Unreadable(
        f"{checkpoint} holds no checkpoint: neither a distributed checkpoint's "
        f"{read_dcp.METADATA} nor DeepSpeed's *_model_states.pt is there or in its folder {ENGINE}"
    )
