"""fp16 under torch and DeepSpeed, their loss scaling included, on real ranks without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.curves import curve
from tests.distributed.interrupted import SAVED, STEPS, interrupted
from tests.distributed.jobs import trained_in_fp16_on_a_cpu, whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"])
def test_the_loss_scale_starts_where_the_config_says_and_grows(
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES[strategy]
    tree["trainer"]["max_steps"] = 6
    fp32 = frozen_run(tree)
    ranks(2)(whole_run, fp32)
    # Low enough that no step overflows.
    tree["precision"] = {
        "compute_dtype": "fp16",
        "initial_loss_scale": 2.0**9,
        "loss_scale_growth_steps": 4,
    }
    fp16 = frozen_run(tree)

    seen = ranks(2)(trained_in_fp16_on_a_cpu, fp16)[0]

    assert seen["loss_scale"] == 2.0**10
    facts = json.loads((fp16 / "engine.json").read_text())
    assert facts["initial_loss_scale"] == 2.0**9
    assert facts["loss_scale_growth_steps"] == 4
    assert facts["precision"] == {
        "compute": "fp16",
        "reduction": "fp32",
        "master": "fp32",
        "moments": "fp32",
    }
    assert curve(fp16) == pytest.approx(curve(fp32), abs=2e-3)
    assert curve(fp16) != curve(fp32), "nothing ran in fp16"


@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero2", "zero3", "fsdp"])
def test_a_resumed_run_goes_on_with_the_loss_scale_and_the_rate_that_it_had_come_to(
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES[strategy]
    # High enough for the first steps to overflow.
    tree["precision"] = {
        "compute_dtype": "fp16",
        "initial_loss_scale": 2.0**21,
        "loss_scale_growth_steps": 2,
    }
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED}
    source = frozen_run(tree)
    whole = ranks(2)(trained_in_fp16_on_a_cpu, source)[0]
    resumed = interrupted(source, tmp_path / "resumed")
    assert ranks(2)(trained_in_fp16_on_a_cpu, resumed)[0] == whole
    assert whole["loss_scale"] != 2.0**21
    assert whole["scheduled"] == STEPS
    for key in ("loss", "learning_rate"):
        assert curve(resumed, key) == curve(source, key)
