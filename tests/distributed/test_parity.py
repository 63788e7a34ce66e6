"""Every strategy learns the same: one config, the same losses, on two ranks and on one."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.train.config import BatchSizes
from tests.distributed.curves import curve, lines
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp")
VARIANTS = {
    **dict.fromkeys(("zero2_offload", "zero3_nothing_kept", "zero3_hierarchical"), "clm"),
    **dict.fromkeys(("fsdp_grad_op", "fsdp_one_unit"), "clm"),
    # The batch of these grows.
    **dict.fromkeys(("zero3_offload", "fsdp_offload", "fsdp_by_size", "fsdp_reduce_once"), "mlm"),
}
"""With the objective that the default suite takes: what tells both apart is the engine's."""
FOUR_RANKS = {
    "fsdp_resharded_in_twos": {"kind": "fsdp", "reshard_ranks": 2},
    "fsdp_hybrid": {"kind": "fsdp", "replicas": 2},
    "fsdp_hybrid_grad_op": {"kind": "fsdp", "replicas": 2, "reshard_after_forward": False},
}


GROWS = {"batch_warmup_from": 6, "batch_warmup_samples": 150}
"""From 6 samples to 16 in a good half of the steps: one or two in a micro-batch at first."""


@pytest.fixture(scope="session")
def reference() -> dict[str, dict[str, list[float]]]:
    """Return the curves of one rank alone, filled in by the first test that needs them."""
    return {}


def told_of_documents(tree: dict[str, Any], *, plainly: bool = False) -> dict[str, Any]:
    """Return a tree whose documents do not see each other, ``plainly`` by a dense mask."""
    model = {**tree["model"], **({"attention": "eager"} if plainly else {})}
    return {**tree, "model": model, "data": {**tree["data"], "document_attention": True}}


def curves_of_one_rank(
    objective: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    reference: dict[str, dict[str, list[float]]],
) -> dict[str, list[float]]:
    if objective not in reference:
        tree = tiny_tree(objective)
        tree["strategy"] = {"kind": "single"}
        tree["launcher"]["nproc_per_node"] = 1
        # The plain way; each strategy has the loss in pieces, and a masked model's of labels alone.
        tree["trainer"]["fused_loss"] = False
        if objective == "mlm":
            tree["objective"]["head_on_labels_only"] = False
            tree["trainer"] |= GROWS
            tree |= told_of_documents(tree, plainly=True)
        else:  # and GELU is one kernel of theirs
            tree["model"]["fused_gelu"] = False
        alone = frozen_run(tree)
        ranks(1)(whole_run, alone)
        reference[objective] = {k: curve(alone, k) for k in ("loss", "eval_loss", "grad_norm")}
    return reference[objective]


def each_engine() -> list[Any]:
    """Return all strategies with both objectives; variants of an engine take one by default."""
    return [
        pytest.param(
            strategy,
            objective,
            marks=pytest.mark.slow if VARIANTS.get(strategy, objective) != objective else (),
        )
        for strategy in (*ENGINES, *VARIANTS)
        for objective in ("clm", "mlm")
    ]


@pytest.mark.parametrize(("strategy", "objective"), each_engine())
def test_two_ranks_learn_what_one_rank_learns(
    strategy: str,
    objective: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    reference: dict[str, dict[str, list[float]]],
) -> None:
    expected = curves_of_one_rank(objective, tiny_tree, frozen_run, ranks, reference)
    tree = tiny_tree(objective)
    if objective == "mlm":
        tree = told_of_documents(tree)
    tree["strategy"] = STRATEGIES[strategy]
    if objective == "mlm":
        tree["trainer"] |= GROWS
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    assert len(expected["loss"]) == 20
    assert expected["loss"][-1] < expected["loss"][0] - 0.1, "nothing was learned"
    assert curve(run_dir) == pytest.approx(expected["loss"], abs=1e-5)
    assert curve(run_dir, "eval_loss") == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert curve(run_dir, "grad_norm") == pytest.approx(expected["grad_norm"], abs=1e-5)
    constant, grows = BatchSizes(16, 16), BatchSizes(16, 6, 150)
    samples = (grows if objective == "mlm" else constant).after(0, 20)
    assert (lines(run_dir)[-1]["samples"], lines(run_dir)[-1]["tokens"]) == (samples, 32 * samples)


def tuned() -> list[Any]:
    """Return what users tune, of values so small that even a tiny model fills many buckets."""
    zero = {"kind": "zero", "reduce_bucket_elements": 3000, "allgather_bucket_elements": 3000}
    gathers = {"prefetch_elements": 2000, "persistence_elements": 0, "max_live_elements": 20_000}
    zero3 = {**zero, **gathers, "stage": 3, "max_reuse_distance_elements": 1000}
    zero3["reduce_bucket_elements"] = 13_000  # a bucket holds the largest parameter
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "overlap": {"overlap_communication": True},
        "scattered": {"contiguous_gradients": False},
        "reduced": {"reduce_scatter": False},
        "round_robin": {"round_robin_gradients": True},
        "offload": {"offload_optimizer": "cpu", "overlap_communication": True},
    }
    of_3 = ("plain", "overlap", "scattered", "offload")
    cases = {f"zero{n}-{way}": {**zero, "stage": n, **ways[way]} for n in (1, 2) for way in ways}
    cases |= {f"zero3-{way}": {**zero3, **ways[way]} for way in of_3}
    cases["ddp"] = {"kind": "ddp", "bucket_size_bytes": 4096}
    in_the_default_suite = ("zero1-plain", "zero2-offload", "zero3-overlap")
    return [
        pytest.param(case, id=name, marks=() if name in in_the_default_suite else pytest.mark.slow)
        for name, case in cases.items()
    ]


@pytest.mark.parametrize("strategy", tuned())
def test_tuning_does_not_change_what_is_learned(
    strategy: dict[str, Any],
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    reference: dict[str, dict[str, list[float]]],
) -> None:
    expected = curves_of_one_rank("clm", tiny_tree, frozen_run, ranks, reference)
    tree = tiny_tree("clm")
    tree["strategy"] = strategy
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    assert curve(run_dir) == pytest.approx(expected["loss"], abs=1e-4)
    assert curve(run_dir, "grad_norm") == pytest.approx(expected["grad_norm"], abs=1e-3)


@pytest.mark.parametrize(("micro_batch_size", "strategy"), [(2, "zero3"), (8, "fsdp")])
def test_neither_accumulation_nor_padding_changes_what_is_learned(
    micro_batch_size: int,
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    curves = []
    for size, unpad, engine in ((4, False, "zero2"), (micro_batch_size, True, strategy)):
        tree = tiny_tree("mlm")
        lines = {"line_by_line": True, "max_cut_fraction": 1}
        tree["data"] |= {**lines, "document_attention": True, "unpad": unpad}
        tree["strategy"] = STRATEGIES[engine]
        tree["trainer"]["micro_batch_size"] = size
        tree["trainer"]["max_steps"] = 5
        run_dir = frozen_run(tree)
        ranks(2)(whole_run, run_dir)
        curves.append(curve(run_dir))
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.parametrize("strategy", FOUR_RANKS)
def test_four_ranks_in_twos_learn_what_one_rank_learns(
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    reference: dict[str, dict[str, list[float]]],
) -> None:
    expected = curves_of_one_rank("clm", tiny_tree, frozen_run, ranks, reference)
    tree = tiny_tree("clm")
    tree["strategy"] = FOUR_RANKS[strategy]
    tree["launcher"]["nproc_per_node"] = 4
    run_dir = frozen_run(tree)
    ranks(4)(whole_run, run_dir)
    assert curve(run_dir) == pytest.approx(expected["loss"], abs=1e-4)
    assert curve(run_dir, "eval_loss") == pytest.approx(expected["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_an_embedding_of_its_own_and_a_head_learn_what_they_learn_on_one_rank(
    objective: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    """FSDP makes both units, and does not gather an embedding for its backward."""
    curves = []
    for strategy in ("single", "fsdp"):
        tree = told_of_documents(tiny_tree(objective), plainly=strategy == "single")
        tree["model"]["tie_word_embeddings"] = False
        tree["strategy"] = {"kind": strategy}
        tree["launcher"]["nproc_per_node"] = world_size = 1 if strategy == "single" else 2
        tree["trainer"]["max_steps"] = 5
        run_dir = frozen_run(tree)
        ranks(world_size)(whole_run, run_dir)
        curves.append(curve(run_dir) + curve(run_dir, "grad_norm"))
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"])
def test_bf16_stays_within_its_rounding_of_fp32(
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    reference: dict[str, dict[str, list[float]]],
) -> None:
    expected = curves_of_one_rank("clm", tiny_tree, frozen_run, ranks, reference)
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES[strategy]
    tree["precision"] = {"compute_dtype": "bf16"}
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    # bf16 has 8 bits of mantissa: one part in 256 of a loss of about 6, averaged over its labels.
    assert curve(run_dir) == pytest.approx(expected["loss"], abs=5e-3)
    assert curve(run_dir) != expected["loss"], "nothing ran in bf16"
