"""set-aside/: what a run had made behind the checkpoint that a resume has gone back to.

Imports no torch.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from shardwright.train.checkpoint.format import layout
from shardwright.train.durable import flush, write_text
from shardwright.train.run_directory import metrics, rollbacks
from shardwright.train.run_directory.names import CHECKPOINTS, METRICS, ROLLBACKS, SET_ASIDE


def folder(run_dir: Path, number: int) -> Path:
    """Return where what resume ``number`` has left behind lies, if there is any."""
    return run_dir / SET_ASIDE / f"resume-{number}"


def newer(run_dir: Path, step: int) -> list[Path]:
    """Return the checkpoints of later steps, whole or not, oldest first."""
    return [path for at, path in layout.named(run_dir / CHECKPOINTS) if at > step]


def put(run_dir: Path, number: int, step: int) -> list[Path]:
    """Set aside what resume ``number`` goes back behind, by renames; return its checkpoints.

    Where nothing is newer than ``step``, nothing is written. metrics.jsonl and rollbacks.jsonl are
    kept there whole, as they were: the ranks drop what they write again. A rollback to a later
    checkpoint no longer says where the data continue. The newest checkpoint goes first, so that
    what a kill leaves is what an earlier resume would have left.
    """
    aside = folder(run_dir, number)
    gone = newer(run_dir, step)
    texts = {}
    if metrics.last_step(run_dir / METRICS) > step:
        texts[METRICS] = (run_dir / METRICS).read_text(encoding="utf-8", errors="replace")
    if any(each.to_step > step for each in rollbacks.read(run_dir)):
        texts[ROLLBACKS] = (run_dir / ROLLBACKS).read_text()
    if not gone and not texts:
        return []
    aside.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(aside / name, text)
    if ROLLBACKS in texts:
        rollbacks.forget_behind(run_dir, step)
    for path in reversed(gone):
        os.rename(path, aside / path.name)
    for directory in (run_dir, run_dir / SET_ASIDE, aside, run_dir / CHECKPOINTS):
        flush(directory)
    return [aside / path.name for path in gone]


def bring_back(run_dir: Path, number: int) -> None:
    """Undo `put`, where nothing was trained since."""
    aside = folder(run_dir, number)
    if not aside.is_dir():
        return
    for name in (METRICS, ROLLBACKS):
        with suppress(FileNotFoundError):
            os.rename(aside / name, run_dir / name)
    for _, path in layout.named(aside):
        os.rename(path, run_dir / CHECKPOINTS / path.name)
    aside.rmdir()
    with suppress(OSError):  # another resume has left something
        aside.parent.rmdir()


def found(run_dir: Path) -> list[tuple[Path, int]]:
    """Return each folder of a run with checkpoints that were set aside, and how many it holds."""
    folders = sorted((run_dir / SET_ASIDE).glob("resume-*"), key=lambda path: path.stat().st_mtime)
    counted = ((path, len(layout.named(path))) for path in folders)
    return [(path, count) for path, count in counted if count]
