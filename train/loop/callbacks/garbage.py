"""Garbage is collected at the same step on every rank: else each stops for it when it happens to.

What is in cycles alone waits for that; the rest is freed at once, as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback


class GarbageCollection(TrainerCallback):
    """Collects every so many steps what was made since; Python's own collection waits meanwhile."""

    def __init__(self, every_steps: int | None) -> None:
        self._every_steps = every_steps
        """None leaves it to Python."""

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Have no garbage collected inside of the block but here."""
        if self._every_steps is None or not gc.isenabled():
            yield
            return
        # The objects of the start are looked at once more, and not again with each collection.
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()

    @contextmanager
    def left_to_python(self) -> Iterator[None]:
        """Inside of the block, in which no step ends, let Python decide."""
        is_enabled = gc.isenabled()
        gc.enable()
        try:
            yield
        finally:
            if not is_enabled:
                gc.disable()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._every_steps is not None and state.global_step % self._every_steps == 0:
            gc.collect(1)
