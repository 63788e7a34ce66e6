"""What a plan says that ranks hold is what the live engines hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks.live_engine import held_and_peak
from shardwright.launchers.plan.peak import peak, uses_autocast
from shardwright.train.config import load
from shardwright.train.plan.model import facts_of, planned
from shardwright.train.plan.trace import traced
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed

LLAMA = {"kind": "llama", "num_key_value_heads": 1, "tie_word_embeddings": False}
MODERNBERT = {"kind": "modernbert", "local_attention_window": 16}
BF16, PURE = (
    {"compute_dtype": "bf16"},
    {
        "compute_dtype": "bf16",
        "reduce_dtype": "bf16",
        "master_dtype": "bf16",
        "moments_dtype": "bf16",
    },
)
CPU = {"offload_optimizer": "cpu"}
SMALL = {"reduce_bucket_elements": 100_000, "allgather_bucket_elements": 100_000}


@dataclass(frozen=True)
class Case:
    """A run, small, and its ranks."""

    name: str
    strategy: dict[str, Any]
    ranks: int = 2
    precision: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    """Of another family than GPT-2, or RoBERTa for mlm."""
    objective: str = "clm"
    recomputes: bool = False
    of_peak: float = 0.05
    """By how much the peak may be missed."""


def zero(stage: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "zero", "stage": stage, **fields}


CASES = [
    Case("single", {"kind": "single"}, 1, BF16),
    Case("ddp-mlm", {"kind": "ddp"}, 2, BF16, objective="mlm", recomputes=True),
    Case("zero0", zero(0), 2, BF16),
    Case("zero1", zero(1, **SMALL), 4),
    Case("zero1-overlap", zero(1, overlap_communication=True, **SMALL), 2),
    Case("zero1-bf16", zero(1), 2, BF16, MODERNBERT, "mlm"),
    Case("zero1-offload", zero(1, **CPU), 4, BF16),
    Case("zero2-fp32", zero(2), 4, recomputes=True),
    Case("zero2-pure", zero(2), 2, PURE, LLAMA),
    Case("zero2-offload", zero(2, **CPU), 4, BF16, objective="mlm"),
    Case("zero3", zero(3, **SMALL), 4, BF16, LLAMA, recomputes=True),
    # What its prefetch covers as a whole it holds in more pieces than are counted.
    Case("zero3-all-at-once", zero(3), 2, of_peak=0.1),
    Case("zero3-offload", zero(3, offload_parameters="cpu", **CPU), 2, BF16),
    Case("fsdp", {"kind": "fsdp"}, 4, BF16, MODERNBERT, "mlm", recomputes=True),
    Case("fsdp-reduce-once", {"kind": "fsdp", "reduce_each_micro_batch": False}, 4, PURE),
    Case("fsdp-hybrid", {"kind": "fsdp", "replicas": 2}, 4, model=LLAMA),
]


def tree_of(case: Case, tree: dict[str, Any]) -> dict[str, Any]:
    model = tree["model"] | {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "max_position_embeddings": 130,
        **case.model,
    }
    if model["kind"] == "llama":
        del model["dropout"]
    tree["model"], tree["strategy"], tree["precision"] = model, case.strategy, case.precision
    tree["launcher"]["nproc_per_node"] = case.ranks
    tree["data"]["sequence_length"] = 128
    # Two micro-batches a step: between them the gradients are held.
    batch = {"global_batch_size": 8 * case.ranks, "micro_batch_size": 4, "eval_max_samples": 2}
    tree["trainer"] |= {"max_steps": 6, **batch}
    tree["trainer"]["checkpoint_activations_every_blocks"] = 1 if case.recomputes else None
    return tree


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_is_what_the_live_engine_holds(
    case: Case, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    run_dir = frozen_run(tree_of(case, tiny_tree(case.objective)))
    config = load(run_dir)
    # What is watched keeps a thread of gloo's for longer.
    held = ranks(case.ranks)(held_and_peak, run_dir, threads_may_stay=True)
    measured = {kind: max(rank[kind] for rank in held) for kind in held[0]}

    model = facts_of(planned(config), config)
    assert model.count == config.model.parameters
    found = peak(config, model, traced(config, autocast=uses_autocast(config)))
    on_device, on_host = found.states.device, found.states.host

    def both(name: str) -> int:
        return int(getattr(on_device, name) + getattr(on_host, name))

    # Of DDP's buckets Python knows nothing; those of ZeRO are alive, as gradients are.
    buckets = 0 if case.strategy["kind"] == "ddp" else both("buckets")
    assert both("weights") == pytest.approx(measured["parameters"], rel=0.02)
    assert both("gradients") + buckets == pytest.approx(measured["gradients"], rel=0.02)
    assert both("optimizer") == pytest.approx(measured["optimizer"], rel=0.02)
    assert found.disk == 0

    # Ranks on a CPU have one memory for both.
    assert found.device + found.host == pytest.approx(measured["passes"], rel=case.of_peak)
    assert measured["update"] < measured["passes"]
