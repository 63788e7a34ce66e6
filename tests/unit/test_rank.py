"""Who a rank is, from what launchers leave in its environment."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from shardwright.train.config import from_tree
from shardwright.train.errors import UserError
from shardwright.train.process import group, inherited, numerics
from shardwright.train.process.cores import cores_of
from shardwright.train.process.group import member
from shardwright.train.process.rank import Rank, device_index, rank_from_environment
from tests.fixtures import TreeOf


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


@pytest.mark.parametrize(
    ("local_index", "in_sight", "index"),
    [(0, 8, 0), (7, 8, 7), (3, 1, 0), (3, 2, 1)],  # a node's GPUs, then each task's own
)
def test_a_rank_takes_its_gpu_among_those_that_it_sees(
    local_index: int, in_sight: int, index: int
) -> None:
    assert device_index(local_index, in_sight) == index


def test_a_rank_that_sees_no_gpu_says_what_hides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        UserError, match=r"this rank sees no GPU \(CUDA_VISIBLE_DEVICES=\); ask for"
    ):
        device_index(0, 0)


def test_torch_nccl_and_deepspeed_are_told_the_same_gpu(
    tiny_tree: TreeOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA and the group are stand-ins: the second of two tasks, each with a GPU of its own."""
    told: dict[str, Any] = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.update(torch=device))
    monkeypatch.setattr(inherited, "check_tf32", lambda *arguments, **settings: None)
    monkeypatch.setattr(numerics, "set_tf32", lambda allowed: told.update(tf32=allowed))
    monkeypatch.setattr(
        group.dist, "init_process_group", lambda *backend, **settings: told.update(settings)
    )
    tree = tiny_tree("clm")
    tree["launcher"]["device"], tree["precision"] = "cuda", {"allow_tf32": True}
    with member(from_tree(tree), Rank(index=1, local_index=1, world_size=2)):
        told["deepspeed"] = os.environ["LOCAL_RANK"]
    first = torch.device("cuda", 0)
    assert (told["torch"], told["device_id"], told["deepspeed"]) == (first, first, "0")
    assert told["tf32"] is True
