"""When a run has gone on for long enough without getting better."""

from __future__ import annotations

import math

import pytest

from shardwright.train.loop.callbacks.early_stopping import without_improvement

NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "threshold", "waited", "best_step"),
    [
        ([], 0.0, 0, 0),
        ([3.0], 0.0, 0, 10),
        ([3.0, 2.0, 1.0], 0.0, 0, 30),
        ([3.0, 2.0, 2.0, 2.5], 0.0, 2, 20),
        ([3.0, 2.0, 2.5, 1.9], 0.0, 0, 40),
        ([3.0, 2.95, 2.9, 2.85], 0.1, 1, 30),  # slow, but past the threshold by step 30
        ([3.0, 2.95, 2.92], 0.1, 2, 10),
        ([3.0, NAN, NAN], 0.0, 2, 10),
        ([NAN, NAN, 9.0, 9.5], 0.0, 1, 30),
        ([NAN, NAN], 0.0, 2, 0),
    ],
)
def test_evaluations_without_improvement(
    losses: list[float], threshold: float, waited: int, best_step: int
) -> None:
    history = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    found = without_improvement(history, threshold=threshold, higher_is_better=False)
    assert found == (waited, best_step)


def test_a_high_accuracy_is_an_improvement() -> None:
    history = [(1, 0.1), (2, 0.3), (3, 0.2)]
    assert without_improvement(history, threshold=0.0, higher_is_better=True) == (1, 2)
