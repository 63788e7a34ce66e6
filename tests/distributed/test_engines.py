"""What was asked for is what runs: asserted on the live engine, and a difference stops the run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.config import load
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.distributed.curves import curve
from tests.distributed.jobs import (
    alone_in_a_shell_of_another_group,
    forget_compiled_code,
    trained,
    trained_as_if_compiled,
    trained_with_broken_engine,
    whole_run,
)
from tests.distributed.optimizers import needs_compiler
from tests.distributed.pool import RanksFailed
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed


def run_dir_of(strategy: dict[str, Any], tiny_tree: TreeOf, frozen_run: Freeze) -> Path:
    tree = tiny_tree("clm")
    tree["strategy"] = strategy
    tree["trainer"]["max_steps"] = 2
    return frozen_run(tree)


def look_at_fsdp(trainer: Trainer) -> dict[str, Any]:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

    parameters = list(trainer.model.parameters())
    states = trainer.torch_optimizer().state.values()
    return {
        "all_dtensor": all(isinstance(p, DTensor) for p in parameters),
        "placements": {str(p.placements) for p in parameters if isinstance(p, DTensor)},
        "expected": str((Shard(0),)),
        "units": sum(isinstance(m, FSDPModule) for m in trainer.model.modules()),
        "local": sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor)),
        "whole": sum(p.numel() for p in parameters),
        "moments_are_sharded": all(isinstance(s["exp_avg"], DTensor) for s in states),
    }


def test_fsdp_has_dtensor_parameters_and_moments(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    run_dir = run_dir_of({"kind": "fsdp"}, tiny_tree, frozen_run)
    seen = ranks(2)(trained, run_dir, look_at_fsdp)
    for facts in seen:
        assert facts["all_dtensor"]
        assert facts["placements"] == {facts["expected"]}
        assert facts["units"] == 3  # two blocks and the root
        assert facts["moments_are_sharded"]
    assert sum(facts["local"] for facts in seen) == seen[0]["whole"]


def moves_of_the_model(run_dir: Path) -> list[str]:
    """Train; return to where somebody else than the engine has moved the model."""
    from unittest import mock

    from transformers import PreTrainedModel

    with mock.patch.object(PreTrainedModel, "to", autospec=True) as to:
        trained(run_dir, lambda _: None)
    return [str(call.args[1:]) for call in to.call_args_list]


@pytest.mark.parametrize("offload", [False, True])
def test_a_model_that_fsdp_has_sharded_is_not_moved(
    offload: bool, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    """On a GPU an offloaded one could not be trained any more; on a CPU nobody would see it."""
    run_dir = run_dir_of({"kind": "fsdp", "offload": offload}, tiny_tree, frozen_run)
    assert ranks(2)(moves_of_the_model, run_dir) == [[], []]


def collectives_of_a_step(run_dir: Path) -> dict[str, int]:
    """Train one step; return how often FSDP gathered parameters and reduced over replicas."""
    from unittest import mock

    import torch.distributed as dist
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group

    gathers = mock.patch.object(
        param_group, "foreach_all_gather", side_effect=collectives.foreach_all_gather
    )
    inside = False
    reductions = 0
    all_reduce = dist.all_reduce

    def reduce(*arguments: Any, **settings: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return collectives.foreach_reduce(*arguments, **settings)
        finally:
            inside = False

    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal reductions
        reductions += inside
        return all_reduce(*arguments, **settings)

    with (
        gathers as gather,
        mock.patch.object(param_group, "foreach_reduce", reduce),
        mock.patch.object(dist, "all_reduce", counted),
    ):
        trained(run_dir, lambda _: None)
    return {"gathers": gather.call_count, "reductions": reductions}


def test_the_root_is_gathered_once_a_step(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = {"kind": "fsdp"}
    tree["trainer"] |= {"max_steps": 1, "micro_batch_size": 8}
    tree["data"]["eval_fraction"] = 0
    # Two blocks before they compute, in each direction, and the root once for both.
    assert ranks(2)(collectives_of_a_step, frozen_run(tree))[0]["gathers"] == 5


def test_an_embedding_is_not_gathered_for_its_backward_nor_a_head_twice(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = {"kind": "fsdp"}
    tree["model"]["tie_word_embeddings"] = False
    tree["trainer"] |= {"max_steps": 1, "micro_batch_size": 8}
    tree["data"]["eval_fraction"] = 0
    # Two blocks in each direction; embedding, head and root once.
    assert ranks(2)(collectives_of_a_step, frozen_run(tree))[0]["gathers"] == 7


def positions_of_the_head(run_dir: Path) -> dict[str, Any]:
    """Train and evaluate; return at how many positions the head is computed, and all there are."""
    rank = rank_from_environment()
    seen: dict[str, list[int]] = {"training": [], "evaluating": []}
    with join(load(run_dir), rank):
        trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
        head: Any = trainer.model.get_output_embeddings()

        def note(module: Any, inputs: Any, output: Any) -> None:
            seen["training" if trainer.model.training else "evaluating"].append(
                inputs[0].shape[:-1].numel()
            )

        head.register_forward_hook(note)
        trainer.train()
    tokens = trainer.config.data.tokens_per_sample
    return {**seen, "positions": trainer.config.trainer.samples_per_pass * tokens}


@pytest.mark.parametrize("on_labels_only", [True, False])
def test_the_head_of_a_masked_model_is_computed_where_it_is_asked_for(
    on_labels_only: bool, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("mlm")
    tree["strategy"] = {"kind": "fsdp"}
    tree["trainer"] |= {"max_steps": 2, "eval_every_steps": 2}
    tree["objective"]["head_on_labels_only"] = on_labels_only
    for seen in ranks(2)(positions_of_the_head, frozen_run(tree)):
        assert seen["training"]
        assert seen["evaluating"]
        for positions in (seen["training"], seen["evaluating"]):
            is_small = max(positions) < seen["positions"] / 2
            assert is_small is on_labels_only


def groups_of_units(run_dir: Path) -> dict[str, int]:
    """Train; return how many groups there are, and over how many ranks blocks are gathered."""
    from torch.distributed import distributed_c10d
    from torch.distributed.fsdp import FSDPModule

    def look(trainer: Trainer) -> dict[str, int]:
        found = [m for m in trainer.model.modules() if isinstance(m, FSDPModule)][1:]
        groups = [g for unit in found for g in unit._get_fsdp_state()._fsdp_param_groups]
        return {
            "groups": len(distributed_c10d._world.pg_map),
            "units": len(found),
            "meshes": len({id(group.post_forward_mesh_info) for group in groups}),
        }

    return trained(run_dir, look)


def test_units_share_the_groups_in_which_they_are_divided_after_forward(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    """By itself torch 2.13 makes two new groups for each unit."""
    seen = {}
    for ranks_after_forward in (None, 2):
        tree = tiny_tree("clm")
        tree["strategy"] = {"kind": "fsdp", "reshard_ranks": ranks_after_forward}
        tree["launcher"]["nproc_per_node"] = 4
        tree["trainer"]["micro_batch_size"] = 4
        run_dir = frozen_run(tree)
        seen[ranks_after_forward] = ranks(4)(groups_of_units, run_dir)[0]
        written = json.loads((run_dir / "engine.json").read_text())
        assert written["reshard_ranks"] == ranks_after_forward
    assert seen[2]["units"] == 2
    assert seen[2]["meshes"] == 1
    assert seen[2]["groups"] == seen[None]["groups"] + 2


@pytest.mark.parametrize("each", [True, False])
def test_replicas_are_reduced_over_once_a_step(
    each: bool, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = {"kind": "fsdp", "replicas": 2, "reduce_each_micro_batch": each}
    tree["trainer"] |= {"max_steps": 1, "global_batch_size": 16, "micro_batch_size": 2}
    tree["launcher"]["nproc_per_node"] = 4
    tree["data"]["eval_fraction"] = 0
    seen = ranks(4)(collectives_of_a_step, frozen_run(tree))[0]
    assert seen["reductions"] == 3, "each unit once, in two micro-batches"


def look_at_zero(trainer: Trainer) -> dict[str, Any]:
    engine = trainer.model_wrapped
    parameters = list(engine.module.parameters())
    return {
        "class": type(engine).__name__,
        "stage": engine.zero_optimization_stage(),
        "optimizer": type(engine.optimizer).__name__,
        # Small parameters stay gathered between steps; a rank owns half of each all the same.
        "partitioned": all(
            hasattr(p, "ds_tensor") and p.ds_numel / 2 <= p.ds_tensor.numel() < p.ds_numel
            for p in parameters
        ),
    }


@pytest.mark.parametrize(
    ("stage", "optimizer", "partitioned"),
    [
        (0, "AdamW", False),
        (1, "DeepSpeedZeroOptimizer", False),
        (2, "DeepSpeedZeroOptimizer", False),
        (3, "DeepSpeedZeroOptimizer_Stage3", True),
    ],
)
def test_each_zero_stage_is_the_one_asked_for(
    stage: int,
    optimizer: str,
    partitioned: bool,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    run_dir = run_dir_of({"kind": "zero", "stage": stage}, tiny_tree, frozen_run)
    for facts in ranks(2)(trained, run_dir, look_at_zero):
        assert facts["class"] == "DeepSpeedEngine"
        assert facts["stage"] == stage
        assert facts["optimizer"] == optimizer
        assert facts["partitioned"] is partitioned
    assert json.loads((run_dir / "engine.json").read_text())["stage"] == stage


@pytest.mark.parametrize(
    ("strategy", "damage", "message"),
    [
        (
            {"kind": "zero", "stage": 1},
            "stage",
            "stage: the config requires 1, the live engine has 2",
        ),
        (
            {"kind": "fsdp"},
            "fall_back_to_ddp",
            "engine: the config requires 'FSDP2', the live engine has 'DistributedDataParallel'",
        ),
        (
            {"kind": "ddp"},
            "dtype",
            r"parameter_dtypes: the config requires .'float32'., the live engine has .'bfloat16'",
        ),
        (
            {"kind": "ddp"},
            "dtype",
            r"'compute': 'fp32'.*'moments': 'fp32'., the live engine has .'compute': 'bf16'",
        ),
        (
            {"kind": "fsdp"},
            "recomputation",
            r"every_blocks: the config requires None, the live engine has 'only blocks \[1\]'",
        ),
        (
            {"kind": "ddp"},
            "tf32",
            "tf32: the config requires False, the live engine has True",
        ),
        (
            {"kind": "ddp"},
            "compiled_by_accelerate",
            r"compiled_otherwise: the config requires .*, the live engine has .*'OptimizedModule'",
        ),
        (
            {"kind": "fsdp"},
            "one_block_compiled",
            "compiled_blocks: the config requires 0, the live engine has 1",
        ),
    ],
)
def test_an_engine_that_differs_from_the_config_stops_the_run(
    strategy: dict[str, Any],
    damage: str,
    message: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    run_dir = run_dir_of(strategy, tiny_tree, frozen_run)
    with pytest.raises(RanksFailed, match=message):
        ranks(2)(trained_with_broken_engine, run_dir, damage)
    assert not (run_dir / "metrics.jsonl").exists(), "a step was trained"


@pytest.mark.parametrize(
    "strategy", [{"kind": "ddp"}, {"kind": "fsdp"}, {"kind": "zero", "stage": 3}]
)
def test_compiled_blocks_are_read_back_under_every_engine(
    strategy: dict[str, Any], tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = strategy
    tree["trainer"] |= {"max_steps": 1, "compile": True}
    facts = ranks(2)(trained_as_if_compiled, frozen_run(tree))[0]
    found = {name: facts[name] for name in ("compile", "compiled_blocks", "compiled_otherwise")}
    assert found == {"compile": True, "compiled_blocks": 2, "compiled_otherwise": []}


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1800)  # that of a cold compiler
@pytest.mark.parametrize(
    ("strategy", "is_whole"),
    [({"kind": "ddp"}, True), ({"kind": "fsdp"}, True), ({"kind": "zero", "stage": 3}, False)],
)
def test_compiled_blocks_learn_the_same_and_are_told_of(
    strategy: dict[str, Any],
    is_whole: bool,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    """Twice: the second run finds what the first has compiled."""

    def train(*, compiles: bool) -> tuple[Path, str]:
        tree = tiny_tree("clm")
        tree["strategy"] = strategy
        tree["trainer"] |= {"max_steps": 3, "compile": compiles}
        run_dir = frozen_run(tree)
        if compiles:
            ranks(2)(forget_compiled_code)
        return run_dir, "".join(ranks(2)(whole_run, run_dir))

    plain, _ = train(compiles=False)
    for _ in range(2):
        compiled, said = train(compiles=True)
        assert curve(compiled) == pytest.approx(curve(plain), abs=1e-5)
        facts = json.loads((compiled / "engine.json").read_text())["compilation"]
        assert facts["functions_given_up"] == 0
        assert bool(facts["graph_breaks"]) is not is_whole
        assert ("no graph breaks" in said) is is_whole
        assert "compiled 2 blocks: " in said


def test_a_group_of_one_waits_for_no_address(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["launcher"] = {"kind": "local", "device": "cpu"}
    tree["strategy"] = {"kind": "ddp"}
    assert ranks(1)(alone_in_a_shell_of_another_group, frozen_run(tree)) == [1]
