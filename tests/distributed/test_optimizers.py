"""Each optimizer learns the same under every engine that takes it, and its state survives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.distributed.curves import curve, lines
from tests.distributed.jobs import (
    forget_compiled_code,
    state_through_dcp,
    state_through_zero0,
    trained_with_broken_engine,
    whole_run,
)
from tests.distributed.optimizers import (
    COMPILED_FOR_DTENSORS,
    OPTIMIZERS,
    PARTS,
    PURE_BF16,
    needs_compiler,
    needs_torchao,
)
from tests.distributed.pool import RanksFailed
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


COLD_COMPILER_SECONDS = 1200
"""DeepSpeed's operator is compiled by the first test on a machine, which may be a busy one."""
CLASSES = {
    "adafactor": "Adafactor",
    "muon": "MuonWithAdamW",
    "adamw_8bit": "AdamW8bit",
    "lion": "Lion",
    "schedule_free": "ScheduleFree",
    "sgd": "SGD",
    "custom": f"{PARTS}:SignMomentum",
}
TAKEN = {
    "adafactor": ("ddp", "zero0"),
    "muon": ("ddp", "fsdp", "zero0"),
    "adamw_8bit": ("ddp", "fsdp", "zero0"),
    "lion": ("zero2", "fsdp"),
    "schedule_free": ("ddp", "zero0", "zero2", "zero3", "zero3_many_groups", "fsdp"),
    "sgd": ("zero3", "fsdp"),
    "custom": ("ddp", "zero0", "zero2", "zero3", "fsdp"),
}
# By default a resume of it is a run on ranks.
SLOW = [("schedule_free", name) for name in TAKEN["schedule_free"]]
SLOW += [("custom", name) for name in TAKEN["custom"] if name != "zero2"]
# Compiled for each strategy anew. FSDP's curve is that of the next test as well.
EIGHT_BIT = {strategy: [needs_torchao, pytest.mark.slow] for strategy in ("ddp", "fsdp")}


def marks_of(name: str, strategy: str) -> Any:
    if name == "adamw_8bit":
        return EIGHT_BIT.get(strategy, needs_torchao)
    return pytest.mark.slow if (name, strategy) in SLOW else ()


CASES = [
    pytest.param(name, strategy, marks=marks_of(name, strategy))
    for name, strategies in TAKEN.items()
    for strategy in strategies
]

Run = Callable[..., Path]


@pytest.fixture
def new_run(tiny_tree: TreeOf, frozen_run: Freeze) -> Run:
    """Return a function that freezes a run of an optimizer under a strategy."""

    def freeze(
        name: str,
        strategy: dict[str, Any],
        objective: str = "clm",
        precision: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> Path:
        tree = tiny_tree(objective)
        tree["trainer"] |= {**OPTIMIZERS[name], **trainer}
        tree["strategy"] = strategy
        tree["precision"] = precision or {}
        tree["launcher"]["nproc_per_node"] = 1 if strategy["kind"] == "single" else 2
        return frozen_run(tree)

    return freeze


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], list[float]]:
    """Return the losses of one rank by optimizer and objective, filled in as tests need them."""
    return {}


def losses_of_one_rank(
    name: str, objective: str, new_run: Run, ranks: Any, alone: dict[tuple[str, str], list[float]]
) -> list[float]:
    if (name, objective) not in alone:
        run_dir = new_run(name, {"kind": "single"}, objective)
        ranks(1)(whole_run, run_dir)
        alone[name, objective] = curve(run_dir)
    return alone[name, objective]


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_two_ranks_learn_what_one_rank_learns(
    name: str,
    strategy: str,
    new_run: Run,
    ranks: RanksOf,
    alone: dict[tuple[str, str], list[float]],
) -> None:
    # RoBERTa's matrices are stored output x input, GPT-2's the other way round.
    objective = "mlm" if strategy == "fsdp" else "clm"
    expected = losses_of_one_rank(name, objective, new_run, ranks, alone)
    run_dir = new_run(name, STRATEGIES[strategy], objective)
    ranks(2)(whole_run, run_dir, threads_may_stay=(name, strategy) == COMPILED_FOR_DTENSORS)
    assert expected[-1] < expected[0] - 0.1, "nothing was learned"
    assert curve(run_dir) == pytest.approx(expected, abs=1e-4)
    optimizer = json.loads((run_dir / "engine.json").read_text())["optimizer"]
    assert optimizer["class"] == CLASSES[name]
    rates = {part["peak_learning_rate"] for part in optimizer["algorithms"].values()}
    assert rates == {OPTIMIZERS[name].get("learning_rate", 1e-3)}


@pytest.mark.wide
@needs_torchao
def test_compiled_code_of_an_earlier_run_is_not_taken_for_another_rank(
    new_run: Run, ranks: RanksOf, alone: dict[tuple[str, str], list[float]]
) -> None:
    expected = losses_of_one_rank("adamw_8bit", "mlm", new_run, ranks, alone)
    for _ in range(2):
        run_dir = new_run("adamw_8bit", STRATEGIES["fsdp"], "mlm")
        ranks(2)(forget_compiled_code)  # what is on disk stays
        ranks(2)(whole_run, run_dir, threads_may_stay=True)
        assert curve(run_dir) == pytest.approx(expected, abs=1e-4)


def test_muon_gathers_uneven_shards_of_a_hybrid_mesh(
    new_run: Run, frozen_run: Freeze, ranks: RanksOf
) -> None:
    curves = []
    for strategy, world_size in (({"kind": "single"}, 1), ({"kind": "fsdp", "replicas": 2}, 4)):
        tree = yaml.safe_load((new_run("muon", strategy) / "config.yaml").read_text())
        tree["model"]["intermediate_size"] = 63  # rows that two shards cannot share equally
        tree["launcher"]["nproc_per_node"] = world_size
        run_dir = frozen_run(tree)
        ranks(world_size)(whole_run, run_dir)
        curves.append(curve(run_dir))
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_stage_0_in_bf16_stays_within_its_rounding_of_fp32(
    name: str,
    new_run: Run,
    ranks: RanksOf,
    alone: dict[tuple[str, str], list[float]],
) -> None:
    expected = losses_of_one_rank(name, "clm", new_run, ranks, alone)
    run_dir = new_run(name, STRATEGIES["zero0"], precision={"compute_dtype": "bf16"})
    ranks(2)(whole_run, run_dir)
    assert curve(run_dir) == pytest.approx(expected, abs=5e-3)
    assert curve(run_dir) != expected, "nothing ran in bf16"


@pytest.mark.wide
@needs_compiler
@pytest.mark.timeout(COLD_COMPILER_SECONDS + 300)
@pytest.mark.parametrize("strategy", ["zero1", "zero2_offload", "zero3_offload"])
def test_deepspeeds_cpu_adam_learns_what_torchs_learns(
    strategy: str,
    new_run: Run,
    ranks: RanksOf,
    alone: dict[tuple[str, str], list[float]],
) -> None:
    expected = losses_of_one_rank("adamw", "clm", new_run, ranks, alone)
    own = {**STRATEGIES[strategy], "offload_optimizer": "cpu", "cpu_adam": "deepspeed"}
    run_dir = new_run("adamw", own)
    ranks(2)(whole_run, run_dir, timeout_seconds=COLD_COMPILER_SECONDS)
    assert curve(run_dir) == pytest.approx(expected, abs=1e-4)
    facts = json.loads((run_dir / "engine.json").read_text())
    assert facts["optimizer"]["class"] == "DeepSpeedCPUAdam"
    assert facts["offload_optimizer"] == "cpu"


@pytest.mark.wide
@needs_compiler
@pytest.mark.timeout(COLD_COMPILER_SECONDS + 300)
@pytest.mark.parametrize("strategy", ["zero2_offload", "zero3_offload"])
def test_pure_bf16_is_offloaded_with_deepspeeds_cpu_adam(
    strategy: str,
    new_run: Run,
    ranks: RanksOf,
    alone: dict[tuple[str, str], list[float]],
) -> None:
    expected = losses_of_one_rank("adamw", "clm", new_run, ranks, alone)
    run_dir = new_run("adamw", {**STRATEGIES[strategy], "cpu_adam": "deepspeed"}, "clm", PURE_BF16)
    ranks(2)(whole_run, run_dir, timeout_seconds=COLD_COMPILER_SECONDS)
    assert curve(run_dir) == pytest.approx(expected, abs=1e-2)
    assert json.loads((run_dir / "engine.json").read_text())["master_dtypes"] == ["bfloat16"]


def assert_same_bits(states: list[dict[str, Any]]) -> None:
    for of_rank in states:
        written, read = of_rank["written"], of_rank["read"]
        assert written["groups"] == read["groups"]
        assert any(state for state in written["state"])
        for one, two in zip(written["state"], read["state"], strict=True):
            assert one.keys() == two.keys()
            for key in one:
                for a, b in zip(one[key], two[key], strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=key)
        for a, b in zip(written["weights"], read["weights"], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "strategy"), [case for case in CASES if case.values[1] in ("ddp", "fsdp")]
)
def test_state_survives_a_distributed_checkpoint_bit_for_bit(
    name: str, strategy: str, new_run: Run, ranks: RanksOf, tmp_path: Path
) -> None:
    run_dir = new_run(name, STRATEGIES[strategy], max_steps=3)
    states = ranks(2)(
        state_through_dcp,
        run_dir,
        tmp_path / "checkpoint",
        threads_may_stay=(name, strategy) == COMPILED_FOR_DTENSORS,
    )
    assert_same_bits(states)
    moments = [m for s in states[0]["written"]["state"] for parts in s.values() for m in parts]
    assert any(m.dtype == np.uint8 for m in moments) == (name == "adamw_8bit")


@pytest.mark.parametrize("name", ["adafactor", "muon"])  # 8-bit moments are written as fp32 ones
def test_state_survives_a_checkpoint_of_stage_0_bit_for_bit(
    name: str, new_run: Run, ranks: RanksOf
) -> None:
    run_dir = new_run(name, STRATEGIES["zero0"], max_steps=3)
    assert_same_bits(ranks(2)(state_through_zero0, run_dir))


def test_another_momentum_than_was_asked_for_stops_the_run(new_run: Run, ranks: RanksOf) -> None:
    run_dir = new_run("muon", STRATEGIES["fsdp"], max_steps=2)
    with pytest.raises(RanksFailed, match=r"requires .*'momentum': 0.95.* has .*'momentum': 0.5"):
        ranks(2)(trained_with_broken_engine, run_dir, "momentum")
    assert not (run_dir / "metrics.jsonl").exists(), "a step was trained"


def test_learning_rates_of_the_log_follow_the_schedule(new_run: Run, ranks: RanksOf) -> None:
    run_dir = new_run("muon", STRATEGIES["fsdp"], max_steps=4, lr_scheduler="linear")
    ranks(2)(whole_run, run_dir)
    rates = [line["learning_rate"] for line in lines(run_dir) if "loss" in line]
    assert rates == pytest.approx([3e-3 * share for share in (1, 0.75, 0.5, 0.25)])
