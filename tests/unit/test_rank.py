"""Who a rank is, from what launchers leave in its environment."""

from __future__ import annotations

import pytest

from shardwright.train.process.group import cores_of
from shardwright.train.process.rank import Rank, rank_from_environment


def test_ranks_of_mpirun_and_srun_are_read_by_their_own_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # for it to be taken back: the function sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHARDWRIGHT_RANKS_OF", "openmpi")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "5")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    assert rank_from_environment() == Rank(index=5, local_index=1, world_size=8)


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        (range(8), 2, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        ([3, 9, 1], 2, [{1}, {3, 9}]),
        ([4, 7], 4, [{4}, {4}, {4}, {7}]),
    ],
)
def test_cores_are_divided_among_the_ranks_of_a_node(
    cores: list[int], ranks: int, shares: list[set[int]]
) -> None:
    assert [cores_of(cores, rank, ranks) for rank in range(ranks)] == shares
