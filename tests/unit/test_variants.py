"""The default suite takes a few variants of each test on ranks, and of all tests together each."""

from __future__ import annotations

import pytest

from tests.variants import by_default

NAMES = [f"tests/distributed/test_{number}.py::test_it" for number in range(60)]


@pytest.mark.parametrize(("count", "taken"), [(1, 1), (2, 2), (3, 2), (8, 2), (9, 3), (21, 3)])
def test_few_of_many_variants_are_taken_and_all_of_few(count: int, taken: int) -> None:
    for name in NAMES:
        found = by_default(name, count)
        assert len(found) == taken
        assert found <= set(range(count))


def test_they_are_evenly_apart() -> None:
    for name in NAMES:
        first, second = sorted(by_default(name, 8))
        assert second - first == 4


@pytest.mark.parametrize("count", [3, 8, 9])
def test_each_variant_is_taken_of_some_test(count: int) -> None:
    assert set().union(*(by_default(name, count) for name in NAMES)) == set(range(count))
