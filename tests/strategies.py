"""The strategies that tests train under, by name; values that are not named are the defaults."""

from __future__ import annotations

from typing import Any

_ZERO3_OFFLOAD = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}

STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "ddp": {"kind": "ddp"},
    "zero0": {"kind": "zero", "stage": 0},
    "zero1": {"kind": "zero", "stage": 1},
    "zero2": {"kind": "zero", "stage": 2},
    "zero2_round_robin": {"kind": "zero", "stage": 2, "round_robin_gradients": True},
    "zero2_offload": {"kind": "zero", "stage": 2, "offload_optimizer": "cpu"},
    "zero3": {"kind": "zero", "stage": 3},
    "zero3_nothing_kept": {"kind": "zero", "stage": 3, "persistence_elements": 0},
    "zero3_hierarchical": {"kind": "zero", "stage": 3, "hierarchical_partition_ranks": 2},
    "zero3_many_groups": {"kind": "zero", "stage": 3, "sub_group_elements": 3000},
    "zero3_offload": {"kind": "zero", "stage": 3, **_ZERO3_OFFLOAD},
    "fsdp": {"kind": "fsdp"},
    "fsdp_grad_op": {"kind": "fsdp", "reshard_after_forward": False},
    "fsdp_hybrid": {"kind": "fsdp", "replicas": 2},
    "fsdp_offload": {"kind": "fsdp", "offload": True},
    "fsdp_by_size": {"kind": "fsdp", "wrap": "size", "min_unit_parameters": 2000},
    "fsdp_one_unit": {"kind": "fsdp", "wrap": "none"},
    "fsdp_reduce_once": {"kind": "fsdp", "reduce_each_micro_batch": False},
}
