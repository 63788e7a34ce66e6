"""A directory of checkpoints, looked through once for all who decide what is in it."""

from __future__ import annotations

import os
from pathlib import Path

from shardwright.train.checkpoint.format import layout


class Listing:
    """What lay in a directory of checkpoints when this was made; nothing where it is not there.

    The files of each checkpoint are looked at no more than once, when somebody asks. Raises OSError
    where the directory cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            names = sorted(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            names = []
        paths = [directory / name for name in names]
        self.temporary = [p for p in paths if p.match(".checkpoint-*.tmp")]
        """Of saves under way, or of killed ones."""
        self.set_aside = [p for p in paths if p.match(".checkpoint-*.old")]
        """Under the name of `layout.set_aside`."""
        steps = [(step, p) for p in paths if (step := layout.step_of(p)) is not None and p.is_dir()]
        self.named = dict(sorted(steps))
        """All that is named as a checkpoint, whole or not, by step, oldest first."""
        self._looked_at: dict[int, layout.Manifest | layout.NotWhole] = {}

    def found(self, step: int) -> layout.Manifest | layout.NotWhole:
        """Return the manifest of a checkpoint that `layout.check_sizes` finds whole, or why not."""
        if step not in self._looked_at:
            try:
                self._looked_at[step] = layout.check_sizes(self.named[step])
            except layout.NotWhole as error:
                self._looked_at[step] = error
        return self._looked_at[step]
