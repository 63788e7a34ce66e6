"""Sharding is real: what a rank holds in bf16 is what the ZeRO paper says, within 5 %.

The paper's table (Rajbhandari et al. 2020, section 5) counts, for each parameter, 2 bytes for it, 2
for its gradient and 12 for master weight and moments. Here gradients are kept and reduced in fp32,
so 4 bytes. DDP and FSDP have no 16-bit copy of their own: the parameter is the master weight (4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.distributed.memory import bytes_held
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed

SMALL_BUCKETS = {"reduce_bucket_elements": 4096, "allgather_bucket_elements": 4096}
ZERO = {"kind": "zero", **SMALL_BUCKETS}
ZERO3 = {**ZERO, "stage": 3, "persistence_elements": 0}
CPU = {"offload_optimizer": "cpu"}

BYTES_PER_PARAMETER: dict[str, tuple[dict[str, Any], Callable[[int], tuple[float, ...]]]] = {
    # strategy: (its fields, ranks -> bytes of the parameter, of its gradient, of optimizer state)
    "ddp": ({"kind": "ddp"}, lambda n: (4, 4, 8)),
    # DeepSpeed accumulates in the compute dtype where nothing is sharded.
    "zero0": ({**ZERO, "stage": 0}, lambda n: (2, 2, 12)),
    # Each gradient whole, in bf16 as it comes and in fp32 as it is accumulated.
    "zero1": ({**ZERO, "stage": 1}, lambda n: (2, 2 + 4, 12 / n)),
    "zero2": ({**ZERO, "stage": 2}, lambda n: (2, 4 / n, 12 / n)),
    "zero3": (ZERO3, lambda n: (2 / n, 4 / n, 12 / n)),
    "fsdp": ({"kind": "fsdp"}, lambda n: (4 / n, 4 / n, 8 / n)),
    "fsdp_grad_op": (
        {"kind": "fsdp", "reshard_after_forward": False},
        lambda n: (4 / n, 4 / n, 8 / n),
    ),
    "fsdp_offload": ({"kind": "fsdp", "offload": True}, lambda n: (4 / n, 4 / n, 8 / n)),
}
OFFLOADED: dict[str, tuple[dict[str, Any], Callable[[int], tuple[float, ...]]]] = {
    # Host memory is this machine's only memory: DeepSpeed's transfer buffers count as gradients.
    "zero2_offload": ({**ZERO, **CPU, "stage": 2}, lambda n: (2, 12 / n)),
    "zero3_offload": ({**ZERO3, **CPU, "offload_parameters": "cpu"}, lambda n: (2 / n, 12 / n)),
}


@pytest.fixture
def weigh(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> Callable[[dict[str, Any], int], list[list[float]]]:
    """Return a function from a strategy and a world size to each rank's bytes per parameter."""

    def weigh(strategy: dict[str, Any], world_size: int) -> list[list[float]]:
        tree = tiny_tree("clm")
        tree["model"] |= {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
        tree["strategy"], tree["precision"] = strategy, {"compute_dtype": "bf16"}
        tree["launcher"]["nproc_per_node"] = world_size
        # Two micro-batches a step: between them the gradients are held.
        tree["trainer"] |= {"max_steps": 3, "micro_batch_size": 8 // world_size}
        held = ranks(world_size)(bytes_held, frozen_run(tree))
        kinds = ("parameters", "gradients", "optimizer")
        return [[rank[kind] / rank["whole_model"] for kind in kinds] for rank in held]

    return weigh


def each_way(ways: Iterable[str]) -> list[Any]:
    """Return each with two ranks and with four, which two engines take by default."""
    return [
        pytest.param(
            name,
            world_size,
            marks=pytest.mark.slow if world_size == 4 and name not in ("zero3", "fsdp") else (),
        )
        for name in ways
        for world_size in (2, 4)
    ]


@pytest.mark.parametrize(("name", "world_size"), each_way(BYTES_PER_PARAMETER))
def test_each_rank_holds_its_share(
    name: str, world_size: int, weigh: Callable[[dict[str, Any], int], list[list[float]]]
) -> None:
    strategy, share = BYTES_PER_PARAMETER[name]
    for held in weigh(strategy, world_size):
        assert held == pytest.approx(share(world_size), rel=0.05)


@pytest.mark.parametrize(("name", "world_size"), each_way(OFFLOADED))
def test_each_rank_offloads_its_share(
    name: str, world_size: int, weigh: Callable[[dict[str, Any], int], list[list[float]]]
) -> None:
    strategy, share = OFFLOADED[name]
    for parameters, _, optimizer in weigh(strategy, world_size):
        assert [parameters, optimizer] == pytest.approx(share(world_size), rel=0.05)


def test_hybrid_shards_within_a_replica(
    weigh: Callable[[dict[str, Any], int], list[list[float]]],
) -> None:
    for held in weigh({"kind": "fsdp", "replicas": 2}, 4):
        assert held == pytest.approx((4 / 2, 4 / 2, 8 / 2), rel=0.05)
