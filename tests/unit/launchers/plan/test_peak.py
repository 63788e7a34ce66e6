"""At which moment of a step most is alive, and what of it is for what; traces are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.plan.candidates import on_hardware
from shardwright.launchers.plan.hardware import chosen
from shardwright.launchers.plan.peak import Peak, peak
from shardwright.launchers.plan.temporaries import temporaries
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.plan.facts import ModelFacts, Parameter, Traced
from tests.unit.launchers.composed import composed

MATRIX = 1000 * 1000
MODEL = ModelFacts(
    (
        Parameter("embedding", (2000, 1000), decays=True),
        Parameter("matrix", (1000, 1000), decays=True, is_hidden_matrix=True),
        Parameter("norm", (1000,), decays=False),
    ),
    2 * MATRIX,
)
BLOCKS = Traced(
    *(600, 700, 900, 1000, 1),
    kept_by_blocks=500,
    forward_of_loss=650,
    backward_of_loss=640,
)


def run(*overrides: str, device: str = "h200x4") -> RunConfig:
    supposed = chosen([f"hardware={device}"])
    assert supposed is not None
    tree, _ = composed(
        "model=gpt2_tiny", "precision=bf16", "trainer.micro_batch_size=1", *overrides
    )
    machine = Machine(compute_capabilities=(9.0,) * supposed.devices, cores=64)
    return resolve(from_tree(on_hardware(tree, supposed)), machine, "plan")


def of(traced: Traced, *overrides: str) -> Peak:
    return peak(run("strategy=ddp", *overrides), MODEL, traced)


def test_a_block_in_its_backward_pass_may_have_most() -> None:
    found = of(BLOCKS)
    assert (found.activations, found.working, found.loss) == (500, 300, 100)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_logits_and_loss_may_have_most(name: str) -> None:
    found = of(replace(BLOCKS, **{name: 2000, f"{name}_of_loss": 2000}))
    assert (found.activations, found.working, found.loss) == (500, 0, 1500)
    assert found.device == found.states.device.total + 2000
    assert sum(found.by_category().values()) == found.device


def test_the_optimizers_step_may_have_most() -> None:
    found = of(BLOCKS, "trainer.optimizer=adafactor")
    assert found.updating == 4 * MODEL.count
    assert (found.activations, found.working, found.loss) == (0, 0, 0)
    assert of(BLOCKS).updating == 0, "fused AdamW has none"


def test_stage_0_has_all_gradients_once_more_in_each_dtype_while_it_reduces_them() -> None:
    found = peak(run("strategy=zero0"), MODEL, BLOCKS)
    assert found.reducing == (2 + 4) * MODEL.count
    as_computed = peak(run("strategy=zero0", "precision.reduce_dtype=bf16"), MODEL, BLOCKS)
    assert as_computed.updating == 4 * MODEL.count, "more than the 2 while it reduces"


def test_what_each_optimizer_and_engine_needs() -> None:
    decaying = 3 * MATRIX

    def bytes_of(*overrides: str, device: str = "h200x4") -> int:
        return temporaries(run(*overrides, device=device), MODEL)

    assert bytes_of("strategy=ddp", "trainer.optimizer=muon") == 16 * MATRIX
    alone = bytes_of("strategy=single", "trainer.optimizer=muon", device="h200")
    assert alone == 12 * MATRIX
    eight_bit = bytes_of("strategy=fsdp", "trainer.optimizer=adamw_8bit")
    assert eight_bit == 8 * 2 * MATRIX // 4
    on_cpus = bytes_of("strategy=ddp", "trainer.optimizer=adafactor", device="cpux4")
    assert on_cpus == 4 * (2 + 1) * MATRIX
    assert bytes_of("strategy=zero0") == 4 * MODEL.count
    assert bytes_of("strategy=zero2") == 4 * decaying // 4
    bf16 = bytes_of("strategy=zero2", "precision.reduce_dtype=bf16")
    assert bf16 == (2 + 4) * decaying // 4
    small = bytes_of("strategy=zero3", "strategy.sub_group_elements=1000")
    assert small == 4 * 1000
    assert bytes_of("strategy=zero2_offload") == 0
    assert bytes_of("strategy=fsdp_offload") == 0
