"""DeepSpeed's estimates of model states, to the byte, against DeepSpeed's own functions."""

from __future__ import annotations

import json

import pytest

from shardwright.launchers.plan.deepspeed_estimates import estimates
from shardwright.train.config import ScratchModel
from tests.unit.launchers.composed import composed
from tests.unit.launchers.fakes import Shardwright, make_shardwright

_, RUN = composed("model=llama_tiny")
MODEL = RUN.model
assert isinstance(MODEL, ScratchModel)
LARGEST = MODEL.padded_vocab_size * MODEL.hidden_size
"""That of the embedding, in so small a model."""
shardwright = pytest.fixture(make_shardwright)

T0_3B = 2_783_959_040, 65_798_144
"""Parameters, and those of the largest layer, of the model that DeepSpeed's documentation takes."""
PUBLISHED = [  # GiB of the host and of the GPU, on one GPU
    ("70.00", "0.25"),
    ("70.00", "0.25"),
    ("62.23", "5.43"),
    ("62.23", "5.43"),
    ("0.37", "46.91"),
    ("15.56", "46.91"),
]


@pytest.mark.parametrize(
    ("counts", "devices", "nodes"),
    [
        (T0_3B, 1, 1),
        (T0_3B, 8, 1),
        (T0_3B, 8, 4),
        ((70_553_706_497, 1_050_673_153), 3, 7),  # what no number of ranks divides
        ((124_439_808, 38_597_376), 1, 3),
    ],
)
def test_every_row_is_deepspeeds_to_the_byte(
    counts: tuple[int, int], devices: int, nodes: int
) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    parameters, largest = counts
    rows = estimates(parameters, largest, devices, nodes)
    assert [row.stage for row in rows] == [2, 2, 3, 3, 3, 3, 3, 3]
    for row in rows:
        if row.stage == 2:
            theirs = zero2(parameters, devices, nodes, cpu_offload=row.offloads_optimizer)
        else:
            theirs = zero3(
                parameters,
                largest,
                devices,
                nodes,
                cpu_offload=row.offloads_optimizer,
                cpu_offload_params=row.offloads_parameters,
                zero_init=row.zero_init,
            )[:2]
        assert (row.host_bytes, row.device_bytes) == theirs


def test_the_published_table() -> None:
    rows = estimates(*T0_3B, 1)[2:]
    found = [(f"{r.host_bytes / 2**30:.2f}", f"{r.device_bytes / 2**30:.2f}") for r in rows]
    assert found == PUBLISHED


def test_states_only_counts_a_model_by_itself(shardwright: Shardwright) -> None:
    words = ("plan", "--states-only", "model=llama_tiny", "hardware=h200x8x2")
    outcome = shardwright(*words, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert (found["devices"], found["nodes"]) == (8, 2)
    rows = estimates(found["parameters"], found["largest_layer"], 8, 2)
    assert [row["device_bytes"] for row in found["estimates"]] == [r.device_bytes for r in rows]
    assert (found["parameters"], found["largest_layer"]) == (MODEL.parameters, LARGEST)

    shown = shardwright(*words).out
    assert f"{found['parameters']:,} parameters" in shown
    assert shown.count("\n    3  ") == 6


def test_what_is_wrong_is_said(shardwright: Shardwright) -> None:
    for words, message in (
        (["hardware=h20"], "unknown hardware h20: did you mean h200?"),
        (["-m", "seed=1,2"], "--states-only is of one run"),
        (["trainer.max_stepz=1"], "unknown key trainer.max_stepz"),
        (["data.sequence_length=4096", "model=gpt2_tiny"], "data.sequence_length=4096"),
        (
            [
                "model=pretrained",
                "model.name=no/such",
                "tokenizer=pretrained",
                "tokenizer.name=a/b",
            ],
            "no/such",
        ),
    ):
        outcome = shardwright("plan", "--states-only", *words)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err
