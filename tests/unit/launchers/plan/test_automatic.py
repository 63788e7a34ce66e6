"""What `auto` comes to fits, and is what a search through all ways finds, traced one by one."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shardwright.launchers.composition.compose import compose, plain
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan import hardware
from shardwright.launchers.plan.automatic import Ways, ways
from shardwright.launchers.plan.choice import AS_FAST
from shardwright.launchers.plan.hardware import Hardware
from shardwright.train.errors import UserError
from tests.unit.launchers.plan.looking import InThisProcess

SMALL = (
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_attention_heads=2",
    "model.num_hidden_layers=2",
    "model.vocab_size=512",
    "data.sequence_length=64",
    "trainer.max_steps=10",
)
MODELS = ("gpt2_tiny", "llama_tiny")
LOOK = InThisProcess()
HERE = Machine((9.0,) * 8, cores=8)


@pytest.fixture(scope="module")
def trees() -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (model, dtype): plain(
            compose([*SMALL, f"model={model}", f"precision={dtype}", "launcher=torchrun"])[0].tree
        )
        for model in MODELS
        for dtype in ("fp32", "bf16")
    }


def a_run(given: dict[str, Any], pick: random.Random) -> tuple[dict[str, Any], Hardware]:
    """Return a run that leaves something to the plan, and hardware on which it may fit or not."""
    ranks, nodes = pick.choice((1, 2, 4)), pick.choice((1, 1, 2))
    device = pick.choice(("cuda", "cpu"))
    trainer = {
        **given["trainer"],
        "global_batch_size": ranks * nodes * pick.choice((1, 2, 4)),
        "micro_batch_size": pick.choice(("auto", "auto", 1, None)),
        "checkpoint_activations_every_blocks": pick.choice(("auto", "auto", None, 1)),
    }
    strategies: list[dict[str, Any]] = [
        *[{"kind": "auto"}] * 4,
        {"kind": "zero", "stage": 3},
        {"kind": "ddp"},
    ]
    launcher = {
        "kind": "torchrun",
        "device": device,
        "nproc_per_node": ranks,
        "nodes": nodes,
        "head_address": "host" if nodes > 1 else None,
    }
    tree = {**given, "trainer": trainer, "strategy": pick.choice(strategies), "launcher": launcher}
    shipped = hardware.shipped("cpu" if device == "cpu" else pick.choice(("h200", "rtx_4090")))
    # Around what these models take, of which some have room nowhere and some everywhere.
    size_mib = 2 ** pick.uniform(-1, 4)
    if device == "cpu":
        sized: dict[str, Any] = {"host_memory_gib": size_mib * ranks / 1024}
    else:
        usable = round(600 + size_mib) / 0.95
        sized = {"memory_mib": round(usable), "host_memory_gib": pick.choice((0.01, 1.0))}
    tree_of = {**shipped.model_dump(), **sized, "devices": ranks, "nodes": nodes}
    return tree, hardware.from_tree(tree_of)


def check(found: Ways) -> str:
    """Compare what is chosen with what is found by looking at all; return which it was."""
    traced = {way: found.candidate(way) for way in found.configs}
    for way, candidate in traced.items():
        assert candidate.peak is not None
        assert candidate.pace is not None
        assert found.at_least(way).device <= candidate.peak.device, way
        assert candidate.pace.step_seconds == pytest.approx(way.seconds, rel=1e-6), way
    fitting = [way for way, candidate in traced.items() if candidate.fits(found.hardware)]
    chosen = found.chosen()
    if chosen is None:
        assert not fitting
        return "nothing"
    assert chosen in fitting, "what is chosen has to fit"
    least = min(way.seconds for way in fitting)
    equals = [way for way in fitting if way.seconds <= least * (1 + AS_FAST)]
    assert chosen.plainness == min(way.plainness for way in equals)
    smaller = found.smaller_than(chosen)
    assert smaller is None or smaller in fitting
    return chosen.strategy or "given"


@pytest.mark.parametrize("runs", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_it_fits_and_is_what_exhaustive_search_picks(
    runs: int, trees: dict[tuple[str, str], dict[str, Any]]
) -> None:
    chosen: list[str] = []
    for seed in range(runs):
        pick = random.Random(seed)
        tree, supposed = a_run(trees[pick.choice(sorted(trees))], pick)
        try:
            found = ways(tree, supposed, HERE, LOOK)  # type: ignore[arg-type]
        except UserError:  # such as a batch that a given micro-batch does not divide
            chosen.append("refused")
            continue
        chosen.append(check(found))
    assert {"nothing", "given"} <= set(chosen)
    assert len(set(chosen) - {"nothing", "given", "refused"}) > 1, "several are the best somewhere"
    assert chosen.count("refused") < runs / 2


def test_all_micro_batches_that_divide_a_ranks_part_are_looked_at(
    trees: dict[tuple[str, str], dict[str, Any]],
) -> None:
    given = trees["gpt2_tiny", "fp32"]
    trainer = {**given["trainer"], "global_batch_size": 24, "micro_batch_size": "auto"}
    launcher = {"kind": "torchrun", "device": "cpu", "nproc_per_node": 2}
    tree = {**given, "trainer": trainer, "launcher": launcher}
    supposed = hardware.chosen(["hardware=cpux2"])
    assert supposed is not None
    found = ways(tree, supposed, HERE, LOOK)  # type: ignore[arg-type]
    assert sorted(way.micro_batch_size for way in found.configs) == [1, 2, 3, 4, 6, 12]


def test_what_needs_an_answer_of_the_users_or_a_package_is_none(
    trees: dict[tuple[str, str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardwright.launchers.plan import automatic

    monkeypatch.setattr(automatic.importlib.util, "find_spec", lambda name: None)
    given = trees["gpt2_tiny", "fp32"]
    tree = {**given, "strategy": {"kind": "auto"}}
    tree["launcher"] = {"kind": "torchrun", "device": "cpu", "nproc_per_node": 2}
    supposed = hardware.chosen(["hardware=cpux2"])
    assert supposed is not None
    found = ways(tree, supposed, HERE, LOOK)  # type: ignore[arg-type]
    assert {"ddp", "fsdp"} <= {way.strategy for way in found.configs}
    assert "strategy=zero2 needs the package deepspeed" in found.problems["zero2"]
    assert "needs strategy.nvme_path, which only you can give" in found.problems["zero3_nvme"]
    assert "runs one rank" in found.problems["single"]


def test_a_run_that_may_lose_nodes_fits_the_fewest(
    trees: dict[tuple[str, str], dict[str, Any]],
) -> None:
    given = trees["gpt2_tiny", "fp32"]
    launcher = {
        **{"kind": "torchrun", "device": "cpu", "nproc_per_node": 1, "head_address": "a"},
        **{"nodes": 4, "min_nodes": 2, "max_restarts": 1},
    }
    trainer = {**given["trainer"], "global_batch_size": 24, "micro_batch_size": "auto"}
    tree = {**given, "trainer": trainer, "launcher": launcher, "strategy": {"kind": "auto"}}
    supposed = replace_nodes(2)
    found = ways(tree, supposed, HERE, LOOK)  # type: ignore[arg-type]
    assert {config.launcher.world_size for config in found.configs.values()} == {2}
    # 24 samples on 2, 3 and 4 ranks are 12, 8 and 6.
    assert {way.micro_batch_size for way in found.configs} == {1, 2}


def replace_nodes(nodes: int) -> Hardware:
    found = hardware.chosen(["hardware=cpu", f"hardware.nodes={nodes}"])
    assert found is not None
    return found
