"""Which strategies a plan finds to fit, and what it says where none does; the trace is made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from shardwright.launchers.commands import plan
from shardwright.launchers.plan import child
from shardwright.launchers.plan.candidates import option_values, strategies
from shardwright.launchers.plan.hardware import GIB
from shardwright.train.config import RunConfig
from shardwright.train.plan.facts import ModelFacts, Parameter, Traced
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

PARAMETERS = 10 * 2**30
MODEL = ModelFacts(
    tuple(Parameter(f"matrix {n}", (2**15, 2**15), decays=True) for n in range(10)),
    2**30,
    (2**30,) * 10,
)
TRACED = Traced(
    kept=8 * GIB, forward=9 * GIB, backward=10 * GIB, backward_growing=12 * GIB, flops=1
)
RUN = ("model=llama_8b", "precision=bf16", "trainer.micro_batch_size=2")


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Have the child answer at once, and note what it is asked."""
    configs: list[RunConfig] = []

    def looked_at(config: RunConfig, autocasts: Sequence[bool]) -> Any:
        configs.append(config)
        return MODEL, [TRACED for _ in autocasts]

    monkeypatch.setattr(child, "looked_at", looked_at)
    return configs


def test_the_options_are_those_of_the_group() -> None:
    assert strategies()[:2] == ["single", "ddp"]
    assert option_values("fsdp_hybrid") == option_values("fsdp") | {"replicas": 2}


def test_what_fits_follows_from_the_bytes(shardwright: Shardwright) -> None:
    outcome = shardwright("plan", *RUN, "hardware=h200x8", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert found["ranks"] == 8
    rows = found["strategies"]
    assert "runs one rank, but launcher.nproc_per_node=8" in rows["single"]["problem"]
    # Of 10 GiB of parameters in bf16: 2 + 12 / 8 bytes for each, and 4 / 8 of gradients.
    states = sum(rows["zero2"]["by_category"][n] for n in ("weights", "gradients", "moments"))
    states += rows["zero2"]["by_category"]["master_weights"]
    assert states == PARAMETERS * (2 + 12 / 8 + 4 / 8)
    for row in (row for row in rows.values() if "problem" not in row):
        assert row["device_bytes"] == sum(row["by_category"].values())
        on_device = row["device_bytes"] <= found["usable_bytes"]
        on_host = row["host_bytes_of_node"] <= 2048 * GIB
        assert row["fits"] == (on_device and on_host)
    assert not rows["ddp"]["fits"]
    assert rows["fsdp"]["fits"]
    assert rows["zero3_nvme"]["disk_bytes_of_node"] > 12 * PARAMETERS * 0.99


def test_a_host_can_be_too_small(shardwright: Shardwright) -> None:
    words = ("plan", *RUN, "strategy=fsdp_offload", "hardware=h200x8", "--json")
    assert json.loads(shardwright(*words).out)["strategies"]["fsdp_offload"]["fits"]
    small = shardwright(*words, "hardware.host_memory_gib=64")
    assert not json.loads(small.out)["strategies"]["fsdp_offload"]["fits"]
    assert small.code == 1


def test_the_table_names_what_to_copy(shardwright: Shardwright) -> None:
    outcome = shardwright("plan", *RUN, "hardware=h200x8x2")
    assert outcome.code == 0
    assert "2 x 8 ranks of 132.8 GiB usable" in outcome.out
    assert "2 samples of 512 tokens a micro-batch" in outcome.out
    assert (
        "strategy=zero1 trainer.micro_batch_size=2 launcher.device=cuda launcher.nproc_per_node=8 "
        "launcher.head_address=HOST launcher.nodes=2"
    ) in outcome.out


def test_a_strategy_that_is_asked_for_is_the_only_one(
    shardwright: Shardwright, asked: list[RunConfig]
) -> None:
    words = ("strategy=zero3", "strategy.persistence_elements=7")
    outcome = shardwright("plan", *RUN, *words, "hardware=h200x8", "--json")
    assert list(json.loads(outcome.out)["strategies"]) == ["zero3"]
    (config,) = asked
    assert config.strategy.model_dump()["persistence_elements"] == 7


def test_the_child_traces_on_a_cpu_what_a_fused_kernel_keeps(
    shardwright: Shardwright, asked: list[RunConfig]
) -> None:
    shardwright("plan", "model=gpt2_small", "hardware=h200", "--json")
    assert asked[-1].launcher.device == "cpu"
    assert asked[-1].model.model_dump()["attention_dropout"] == 0
    shardwright("plan", "model=gpt2_small", "hardware=cpu", "--json")
    assert asked[-1].model.model_dump()["attention_dropout"] == 0.1


def test_where_nothing_fits_it_says_what_would_be_needed(shardwright: Shardwright) -> None:
    outcome = shardwright("plan", *RUN, "strategy=zero3", "hardware=rtx_4090x4")
    assert outcome.code == 1
    assert "nothing fits: the least of a device, strategy=zero3" in outcome.err
    assert "strategy=zero3 fits 8 such node(s)" in " ".join(outcome.err.split())
    assert "trainer.micro_batch_size=1" in outcome.err
    assert "trainer.checkpoint_activations_every_blocks=1" in outcome.err


def test_no_number_of_nodes_helps_ddp(shardwright: Shardwright) -> None:
    outcome = shardwright("plan", *RUN, "strategy=ddp", "hardware=rtx_4090x4")
    assert outcome.code == 1
    assert "such node(s)" not in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "on which hardware? Add hardware=NAME, such as h200x8 for a node of 8; there are"),
        (["hardware=h20"], "unknown hardware h20: did you mean h200?"),
        (["hardware=h200x3"], "cannot be divided evenly among 3 rank(s)"),
        (["hardware=h200", "hardware.memory_mib=-1"], "hardware.memory_mib=-1: must be at least 1"),
        (["hardware=h200", "trainer.micro_batch_size=-1"], "trainer.micro_batch_size=-1: must be"),
    ],
)
def test_bad_input(shardwright: Shardwright, words: list[str], message: str) -> None:
    outcome = shardwright("plan", "model=llama_8b", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_the_parser_knows_every_flag() -> None:
    known = {flag for action in plan.parser()._actions for flag in action.option_strings}
    assert set(plan.FLAGS) <= known
