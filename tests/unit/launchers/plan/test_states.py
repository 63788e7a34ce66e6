"""What a rank holds between two micro-batches, in numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.plan.states import Held, States, states
from shardwright.train.plan.facts import ModelFacts, Parameter
from tests.unit.launchers.composed import composed

MODEL = ModelFacts(
    (
        Parameter("embedding", (100, 10), decays=True),
        Parameter("matrix", (30, 10), decays=True),
        Parameter("bias", (10,), decays=False),
    ),
    1000,
)
COUNT = 1310
SMALL = ("strategy.persistence_elements=10", "strategy.reduce_bucket_elements=500")


def held(*overrides: str, ranks: int = 4, model: ModelFacts = MODEL) -> Held:
    _, run = composed(
        "model=gpt2_tiny",
        f"launcher.nproc_per_node={ranks}",
        "trainer.global_batch_size=64",
        "trainer.micro_batch_size=8",
        *overrides,
    )
    return states(resolve(run, Machine(compute_capabilities=(9.0,) * 8), "/runs/a"), model)


def test_what_is_replicated_is_whole() -> None:
    found = held("strategy=ddp", "precision=bf16").device
    assert (found.weights, found.gradients, found.moments) == (4 * COUNT, 4 * COUNT, 8 * COUNT)
    assert found.buckets == 4 * COUNT, "beside the gradients of micro-batches not reduced"
    one = held("strategy=ddp", "trainer.micro_batch_size=16").device
    assert one.buckets == 0


def test_zero_2_in_fp32_keeps_whole_what_two_ranks_share() -> None:
    # Two groups: 1,300 that decay in parts of 326, 10 that do not in parts of 4.
    found = held("strategy=zero2", "precision=fp32").device
    assert found.master_weights == 4 * (326 + 4)
    # The part of the fourth rank begins in the embedding and ends in the matrix; it has no bias.
    assert found.gradients == 4 * (1000 + 300)
    assert held("strategy=zero2", "precision=bf16").device.gradients == 4 * (326 + 4)


def test_zero_3_divides_each_parameter_and_keeps_small_ones() -> None:
    found = held("strategy=zero3", "precision=bf16", *SMALL).device
    part = 250 + 75 + 3
    assert (found.weights, found.kept_whole) == (2 * part, 2 * 10)
    assert (found.gradients, found.optimizer) == (4 * part, 12 * part)
    assert found.buckets == 4 * 500


def test_fsdp_divides_rows() -> None:
    found = held("strategy=fsdp", "precision=bf16").device
    part = 25 * 10 + 8 * 10 + 3
    assert found == States(weights=4 * part, gradients=4 * part, moments=8 * part)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["strategy=zero3_offload"], "host"),
        (["strategy=zero3_nvme", "strategy.nvme_path=/tmp"], "disk"),
        (["strategy=fsdp_offload"], "host"),
        (["strategy=zero2_offload"], "host"),
    ],
)
def test_what_is_offloaded_is_not_on_the_device(overrides: list[str], where: str) -> None:
    found = held(*overrides, "precision=bf16")
    place: Any = getattr(found, where)
    assert place.optimizer > 0
    assert found.device.optimizer == 0


def test_what_is_not_trained_has_neither_gradients_nor_moments() -> None:
    frozen = replace(MODEL.parameters[0], trains=False)
    model = replace(MODEL, parameters=(frozen, *MODEL.parameters[1:]))
    trained = 310
    found = held("strategy=ddp", "precision=bf16", model=model).device
    assert (found.weights, found.gradients) == (4 * COUNT, 4 * trained)
    assert (found.moments, found.buckets) == (8 * trained, 4 * trained)

    found = held("strategy=zero2", "precision=bf16", model=model).device
    part = 76 + 4
    assert (found.weights, found.optimizer) == (2 * COUNT, 12 * part)
    assert found.gradients == 4 * part

    found = held("strategy=zero3", "precision=bf16", *SMALL, model=model).device
    assert (found.weights, found.optimizer) == (2 * (250 + 75 + 3), 12 * (75 + 3))
    assert found.gradients == 4 * (75 + 3)

    found = held("strategy=fsdp", "precision=bf16", model=model).device
    of_weights, part = 25 * 10 + 8 * 10 + 3, 8 * 10 + 3
    assert found == States(weights=4 * of_weights, gradients=4 * part, moments=8 * part)
