"""What people read of sizes and times."""

from __future__ import annotations

import pytest

from shardwright.train.units import duration, size


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949_999, "99.9 MB"),
        (123_456_789, "123 MB"),
        (999_500_000, "1.0 GB"),
        (1_234_567_890_123, "1.2 TB"),
        (1_234_567_890_123_456, "1235 TB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5, "0 s"),  # clocks of two machines
        (5.4, "5 s"),
        (119, "119 s"),
        (150, "2 min"),
        (3599.6, "1 h 0 min"),
        (3700, "1 h 1 min"),
        (100_000, "1 d 3 h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
