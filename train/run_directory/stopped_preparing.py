"""Where a run has stopped that was told to while its data were being prepared.

Imports no torch.
"""

from __future__ import annotations

import time
from pathlib import Path

from shardwright.train.checkpoint.format import layout
from shardwright.train.run_directory import stop_note
from shardwright.train.run_directory.names import CHECKPOINTS


def note(run_dir: Path, reason: str) -> None:
    """Write down where the run has stopped: at its newest checkpoint, or before it began."""
    whole = layout.whole_checkpoints(run_dir / CHECKPOINTS)
    newest = whole[-1][1] if whole else None
    manifest = layout.read_manifest(newest) if newest else None
    stop_note.Stopped(
        step=manifest.step if manifest else 0,
        samples=manifest.samples if manifest else 0,
        reason=reason,
        time=time.time(),
        checkpoint=str(newest) if newest else None,
        progress_steps=0,
        while_preparing=True,
    ).write(run_dir)
