"""The size that a plan gives a checkpoint is what live runs have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.plan.hardware import chosen
from shardwright.launchers.plan.saves import checkpoint
from shardwright.train.plan.model import facts_of, planned
from tests.unit.launchers.composed import composed

MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks/results/save-cpu.json").read_text())


@pytest.mark.parametrize("strategy", MEASURED["strategies"])
def test_a_checkpoint_has_the_bytes_that_were_measured(strategy: str) -> None:
    """Of a model with a tied head, which torch's checkpoints hold twice and DeepSpeed's once."""
    _, run = composed(
        *(f"model={MEASURED['model']}", f"strategy={strategy}", "precision=fp32"),
        f"launcher.nproc_per_node={MEASURED['ranks']}",
    )
    config = resolve(run, Machine(cores=2), "/runs/a")
    hardware = chosen([f"hardware=cpux{MEASURED['ranks']}"])
    assert hardware is not None
    found = checkpoint(config, facts_of(planned(config), config), hardware)
    measured = MEASURED["strategies"][strategy]["checkpoint_bytes"]
    assert found.size_bytes == pytest.approx(measured, rel=0.002)
