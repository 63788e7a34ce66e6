"""Which strategies a plan finds to fit, and what it says where none does; the trace is made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from shardwright.launchers.commands import plan, plan_table
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

    def looked_at_each(asked: Sequence[tuple[RunConfig, Sequence[bool]]]) -> list[Any]:
        configs.extend(config for config, _ in asked)
        return [(MODEL, [TRACED for _ in autocasts]) for _, autocasts in asked]

    monkeypatch.setattr(child, "looked_at_each", looked_at_each)
    return configs


def test_the_options_are_those_of_the_group() -> None:
    assert strategies()[:2] == ["single", "ddp"]
    assert option_values("fsdp_hybrid") == option_values("fsdp") | {"replicas": 2}


def test_what_fits_follows_from_the_bytes(shardwright: Shardwright) -> None:
    outcome = shardwright("plan", *RUN, "hardware=h200x8", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    (found,) = json.loads(outcome.out)["plans"]
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


def _only(text: str) -> dict[str, Any]:
    """Return the strategies of the only plan in what was printed."""
    (found,) = json.loads(text)["plans"]
    strategies: dict[str, Any] = found["strategies"]
    return strategies


def test_a_host_can_be_too_small(shardwright: Shardwright) -> None:
    words = ("plan", *RUN, "strategy=fsdp_offload", "hardware=h200x8", "--json")
    assert _only(shardwright(*words).out)["fsdp_offload"]["fits"]
    small = shardwright(*words, "hardware.host_memory_gib=64")
    assert not _only(small.out)["fsdp_offload"]["fits"]
    assert small.code == 1


def test_the_table_names_what_to_copy(shardwright: Shardwright) -> None:
    outcome = shardwright("plan", *RUN, "hardware=h200x8x2")
    assert outcome.code == 0
    assert "2 x 8 ranks of 132.8 GiB usable" in outcome.out
    assert "2 samples of 512 tokens a micro-batch" in outcome.out
    assert (
        "trainer.micro_batch_size=2 launcher.device=cuda launcher.nproc_per_node=8 "
        "launcher.head_address=HOST launcher.nodes=2"
    ) in outcome.out


def test_what_fits_is_sorted_by_its_speed_and_the_first_is_to_be_copied(
    shardwright: Shardwright,
) -> None:
    found = json.loads(shardwright("plan", *RUN, "hardware=h200x8", "--json").out)
    rows = found["plans"][0]["strategies"]
    fitting = {n: row["tokens_per_second"] for n, row in rows.items() if row.get("fits")}
    best = max(fitting, key=lambda name: fitting[name])
    assert found["fastest"] == {"plan": 0, "strategy": best, "overrides": rows[best]["overrides"]}
    text = shardwright("plan", *RUN, "hardware=h200x8").out
    named = [line.split()[0] for line in text.splitlines() if " yes " in line]
    assert named == sorted(fitting, key=lambda name: -fitting[name])
    told = text.partition("the fastest that fits: ")[2]
    assert told.splitlines()[1].strip() == " ".join(rows[best]["overrides"])
    for row in (row for row in rows.values() if "problem" not in row):
        assert row["step_seconds"] == pytest.approx(sum(row["step_seconds_by_category"].values()))


def test_several_values_are_compared_in_one_table(
    shardwright: Shardwright, asked: list[RunConfig]
) -> None:
    words = (
        *("plan", "model=llama_8b", "precision=bf16", "trainer.micro_batch_size=1,2"),
        *("trainer.checkpoint_activations_every_blocks=null,1", "strategy=zero2,fsdp"),
        "hardware=h200x8,h200x16",
    )
    outcome = shardwright(*words, "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert len(found["plans"]) == 2 * 2 * 2 * 2
    assert {tuple(plan["strategies"]) for plan in found["plans"]} == {("zero2",), ("fsdp",)}
    assert {plan["ranks"] for plan in found["plans"]} == {8, 16}
    assert len(asked) == 4, "one trace for each micro-batch with what it recomputes"
    speeds = {
        (number, name): row["tokens_per_second"]
        for number, plan in enumerate(found["plans"])
        for name, row in plan["strategies"].items()
        if row["fits"]
    }
    best = found["fastest"]
    assert speeds[best["plan"], best["strategy"]] == max(speeds.values())
    text = shardwright(*words).out
    head = next(line for line in text.splitlines() if line.startswith("hardware"))
    assert head.split()[:5] == ["hardware", "micro", "recompute", "strategy", "fits"]
    assert "h200x8: 1 x 8 ranks" in text
    assert "h200x16: 1 x 16 ranks" in text
    (_, copied) = text.partition("the fastest that fits: ")[2].splitlines()[:2]
    assert copied.split() == best["overrides"]
    assert any(w.startswith("trainer.checkpoint_activations_every_blocks=") for w in copied.split())


def test_keys_of_the_hardware_are_compared_too(shardwright: Shardwright) -> None:
    words = ("strategy=fsdp", "hardware=h200x8", "hardware.nodes=1,2,4", "--json")
    found = json.loads(shardwright("plan", *RUN, *words).out)
    assert [plan["ranks"] for plan in found["plans"]] == [8, 16, 32]


def test_a_disk_has_to_be_named_for_what_goes_there(shardwright: Shardwright) -> None:
    words = ("strategy=zero3_nvme", "strategy.nvme_path=/tmp", "hardware=h200x8", "--json")
    row = _only(shardwright("plan", *RUN, *words).out)["zero3_nvme"]
    assert "strategy.nvme_path=DIRECTORY" in row["overrides"]


def test_a_strategy_that_is_asked_for_is_the_only_one(
    shardwright: Shardwright, asked: list[RunConfig]
) -> None:
    words = ("strategy=zero3", "strategy.persistence_elements=7")
    outcome = shardwright("plan", *RUN, *words, "hardware=h200x8", "--json")
    assert list(_only(outcome.out)) == ["zero3"]
    (config,) = asked
    assert config.strategy.model_dump()["persistence_elements"] == 7
    outcome = shardwright("plan", *RUN, "strategy.bucket_size_bytes=9", "hardware=h200x8", "--json")
    assert list(_only(outcome.out)) == ["ddp"], "the one that the key is of"


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


def test_where_no_combination_fits_the_least_is_named(shardwright: Shardwright) -> None:
    words = ("model=llama_8b", "precision=bf16", "trainer.micro_batch_size=1,2", "strategy=ddp")
    outcome = shardwright("plan", *words, "hardware=rtx_4090x4")
    assert outcome.code == 1
    err = " ".join(outcome.err.split())
    assert "the least of a device, strategy=ddp trainer.micro_batch_size=1, is" in err


def test_a_long_table_is_cut(shardwright: Shardwright) -> None:
    words = (*RUN, "hardware=h200x8,h200x16", "hardware.network_gb_per_second=25,50")
    text = shardwright("plan", *words).out
    rows = [line for line in text.splitlines() if line.startswith("h200x") and ":" not in line]
    assert len(rows) == plan_table.MOST_ROWS
    found = json.loads(shardwright("plan", *words, "--json").out)["plans"]
    all_rows = sum("fits" in row for plan in found for row in plan["strategies"].values())
    assert f"and {all_rows - len(rows)} more, slower or too large; --json has all" in text


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
        (["hardware=h200,h20"], "unknown hardware h20: did you mean h200?"),
        (["hardware=h200x8,h200x-8"], "unknown hardware h200x-8: did you mean h200?"),
        (["hardware=h200", "seed=range(300)"], "300 combinations to plan, and 100 is the most"),
        (["hardware=h200", "--states-only", "seed=1,2"], "--states-only is of one run"),
        (
            ["hardware=v100", "precision=bf16"],
            "this hardware has no products in bf16 (hardware.peak_teraflops.bf16=null); "
            "choose precision=fp32 or fp16",
        ),
    ],
)
def test_bad_input(shardwright: Shardwright, words: list[str], message: str) -> None:
    outcome = shardwright("plan", "model=llama_8b", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_the_parser_knows_every_flag() -> None:
    known = {flag for action in plan.parser()._actions for flag in action.option_strings}
    assert set(plan.FLAGS) <= known
