"""What people read of sizes and times."""

from __future__ import annotations

import pytest

from shardwright.train.units import bytes_of, duration, seconds_of, size


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


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("500", 500),
        ("7B", 7),
        ("1.5kB", 1500),
        ("50GB", 50 * 10**9),
        ("50 gb", 50 * 10**9),
        ("2TiB", 2 * 2**40),
        ("3M", 3 * 10**6),
    ],
)
def test_bytes_are_understood(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45min", 2700), ("12 h", 43200), ("30d", 30 * 86400)]
)
def test_times_are_understood(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "GB", "5XB", "5 5", "soon"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    for read in (bytes_of, seconds_of):
        with pytest.raises(ValueError):  # noqa: PT011 (of whatever message)
            read(text)
