"""The time that is left is counted in samples: a step takes longer where the batch has grown."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from shardwright.train.config import BatchSizes
from shardwright.train.loop.callbacks import progress as callback


@pytest.mark.parametrize(
    ("samples_at", "left"),
    # Three steps in 30 seconds: of equal ones, or of 5, 7 and 8 samples, and then 84 in six steps.
    [
        (lambda step: step, 60.0),
        (lambda step: BatchSizes(16, 4, 60).after(0, step), 84 / 20 * 30),
    ],
)
def test_steps_to_come_are_as_slow_as_they_are_large(
    samples_at: Callable[[int], int], left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = callback.Progress(io.StringIO(), samples_at=samples_at)
    shown._first_ended = (1, 100.0)
    monkeypatch.setattr(callback, "time", SimpleNamespace(monotonic=lambda: 130.0))
    assert shown._left_seconds(4, 10) == pytest.approx(left)
    assert shown._left_seconds(1, 10) is None
