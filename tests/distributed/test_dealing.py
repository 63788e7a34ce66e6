"""Muon orthogonalises each matrix on one rank, and gives every rank what one rank alone gets."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwright.train.optimizer import muon
from shardwright.train.process.leave import leave_process_group
from tests.fixtures import RanksOf

pytestmark = pytest.mark.distributed

# Rows that ranks do not divide, fewer rows than ranks, wide and tall ones, some alike.
SHAPES = [(33, 16), (64, 64), (16, 48), (1, 9), (5, 7), *[(40, 24)] * 4, (128, 32), (3, 3)]
STEPS = 3


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


class _Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *made])
        return result


def stepped(mesh_shape: tuple[int, ...] | None, with_found_inf: bool) -> dict[str, Any]:
    """Take some steps; return the matrices, and what this rank has orthogonalised.

    Matrices are divided over a mesh, replicas before shards, or whole on all ranks without one.
    """
    orthogonalised: list[int] = []
    sound = muon._zeropower_via_newtonschulz

    def counted(whole: Tensor, *rest: Any) -> Tensor:
        orthogonalised.append(whole.numel())
        return sound(whole, *rest)

    def placed(tensor: Tensor) -> Tensor:
        if mesh_shape is None:
            return tensor
        placements = [Shard(0)] if len(mesh_shape) == 1 else [Replicate(), Shard(0)]
        return distribute_tensor(tensor, mesh, placements)

    if mesh_shape is not None:
        names = ("replicas", "shards")[-len(mesh_shape) :]
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    matrices = [nn.Parameter(placed(tensor)) for tensor in values(0)]
    bias = nn.Parameter(torch.ones(4))
    groups: list[dict[str, Any]] = [
        {"params": matrices[:5], "weight_decay": 0.1},
        {"params": matrices[5:]},
    ]
    optimizer = muon.MuonWithAdamW(
        torch.optim.AdamW([bias], lr=1e-3, fused=True),
        torch.optim.Muon(groups, lr=0.02),
    )
    if with_found_inf:
        optimizer.found_inf = torch.tensor(0.0)
    largest = _Largest()
    with mock.patch.object(muon, "_zeropower_via_newtonschulz", counted):
        for step in range(STEPS):
            for matrix, gradient in zip(matrices, values(1 + step), strict=True):
                matrix.grad = placed(gradient)
            bias.grad = torch.ones(4)
            with largest:
                optimizer.step()
    whole = [m.full_tensor() if isinstance(m, DTensor) else m for m in matrices]
    return {
        "matrices": [matrix.detach().numpy() for matrix in whole],
        "orthogonalised": orthogonalised,
        "largest": largest.elements,
    }


def stepped_in_a_group(mesh_shape: tuple[int, ...] | None, with_found_inf: bool) -> dict[str, Any]:
    dist.init_process_group("gloo")
    try:
        return stepped(mesh_shape, with_found_inf)
    finally:
        leave_process_group()


CASES = [
    *((2, None, False), (2, (2,), True)),
    *((4, None, True), (4, (4,), False), (4, (2, 2), True), (4, (4, 1), False)),
]


@pytest.mark.parametrize(("world_size", "mesh_shape", "with_found_inf"), CASES)
def test_each_matrix_is_orthogonalised_by_one_rank_to_the_same_bits(
    world_size: int, mesh_shape: tuple[int, ...] | None, with_found_inf: bool, ranks: RanksOf
) -> None:
    (expected,) = ranks(1)(stepped, None, with_found_inf)
    found = ranks(world_size)(stepped_in_a_group, mesh_shape, with_found_inf)
    for rank in found:
        for one, other in zip(rank["matrices"], expected["matrices"], strict=True):
            assert (one == other).all()
    everyone = sorted(n for rank in found for n in rank["orthogonalised"])
    assert everyone == sorted(expected["orthogonalised"])
    assert len(everyone) == STEPS * len(SHAPES)
    # (128, 32), the costliest, is nearly half of all: another rank has most of the others.
    most = max(len(rank["orthogonalised"]) for rank in found)
    assert most < STEPS * len(SHAPES)
    # Nothing larger than the largest matrix, or than the rows of a round, is made.
    for rank in found:
        assert rank["largest"] <= 2 * max(a * b for a, b in SHAPES)
