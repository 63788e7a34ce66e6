"""What a model takes at the least, and that it is refused only where it can never fit."""

from __future__ import annotations

import re
from typing import Any

import pytest

from shardwright.launchers.composition.compose import CONF, compose
from shardwright.launchers.machine import memory
from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.config import RunConfig
from shardwright.train.config.model import Gpt2Model
from tests.unit.launchers.composed import PRESETS, composed

GIB = 2**30


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_that_the_presets_first_line_says(preset: str) -> None:
    """Which a test compares with the model that is built."""
    line = (CONF / "model" / f"{preset}.yaml").read_text().partition("\n")[0]
    said = re.search(r"([\d,]+) parameters", line)
    assert said is not None
    assert composed(f"model={preset}")[1].model.parameters == int(said[1].replace(",", ""))


def test_embeddings_that_are_not_tied_count_twice() -> None:
    tied, untied = (
        composed("model=gpt2_tiny", f"model.tie_word_embeddings={tied}")[1].model.parameters
        for tied in ("true", "false")
    )
    model = composed("model=gpt2_tiny")[1].model
    assert isinstance(model, Gpt2Model)
    assert tied is not None
    assert untied is not None
    assert untied - tied == model.padded_vocab_size * model.hidden_size


def run(*overrides: str, **here: Any) -> tuple[RunConfig, Machine]:
    (job,) = compose(["model=llama_8b", "trainer.global_batch_size=64", *overrides])
    from shardwright.launchers.composition.compose import plain
    from shardwright.train.config import from_tree

    machine = Machine(cores=8, **here)
    return resolve(from_tree(plain(job.tree)), machine, "/runs/a"), machine


def bytes_each(*overrides: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return the bytes for each parameter on a device and in host memory, by part."""
    config, _ = run(*overrides, compute_capabilities=(9.0,) * 4)
    parts = memory.needed(config, 1)
    return tuple({k: v for k, v in vars(part).items() if v} for part in parts)  # type: ignore[return-value]


ALL_FP32 = {"weights": 4.0, "gradients": 4.0, "moments": 8.0}
FOUR = ("launcher.nproc_per_node=4",)


@pytest.mark.parametrize(
    ("overrides", "device", "host"),
    [
        (["strategy=single", "launcher=local", "precision=fp32"], ALL_FP32, {}),
        (["strategy=ddp", *FOUR, "precision=fp32"], ALL_FP32, {}),
        (
            ["strategy=zero1", *FOUR, "precision=bf16"],
            {"weights": 2.0, "master_weights": 1.0, "gradients": 2.0, "moments": 2.0},
            {},
        ),
        (
            ["strategy=zero3", *FOUR, "precision=bf16"],
            {"weights": 0.5, "master_weights": 1.0, "gradients": 0.5, "moments": 2.0},
            {},
        ),
        (
            ["strategy=zero2_offload", *FOUR, "precision=bf16"],
            {"weights": 2.0},
            {"master_weights": 1.0, "gradients": 0.5, "moments": 2.0},
        ),
        (["strategy=zero3_nvme", *FOUR, "strategy.nvme_path=/d", "precision=bf16"], {}, {}),
        (["strategy=fsdp", *FOUR, "precision=fp32"], {k: v / 4 for k, v in ALL_FP32.items()}, {}),
        (
            ["strategy=fsdp_hybrid", "strategy.replicas=2", *FOUR, "precision=fp32"],
            {k: v / 2 for k, v in ALL_FP32.items()},
            {},
        ),
        (
            ["strategy=fsdp_offload", *FOUR, "precision=fp32"],
            {},
            {k: v / 4 for k, v in ALL_FP32.items()},
        ),
    ],
)
def test_what_a_rank_holds(
    overrides: list[str], device: dict[str, float], host: dict[str, float]
) -> None:
    assert bytes_each(*overrides) == (device, host)


def test_a_model_that_can_never_fit_is_refused_with_the_numbers() -> None:
    on_cpu = ("strategy=ddp", "launcher.device=cpu", "launcher.nproc_per_node=2", "precision=fp32")
    config, machine = run(*on_cpu, memory_bytes=64 * GIB)
    (said,) = memory.problems(config, machine)
    assert said == (
        "strategy.kind=ddp on 2 rank(s) with a llama of 8,030,261,248 parameters takes at least "
        "239.3 GiB of this machine's memory (weights 59.8 GiB, gradients 59.8 GiB, moments 119.7 "
        "GiB, of 2 rank(s) here), which has 64.0 GiB; choose a smaller model, more nodes with "
        "strategy=zero3 or fsdp, or strategy=zero3_nvme"
    )
    gpus = {"compute_capabilities": (9.0,) * 8, "gpu_memory_bytes": 80 * GIB}
    config, machine = run("strategy=ddp", "precision=fp32", memory_bytes=64 * GIB, **gpus)
    (said,) = memory.problems(config, machine)
    assert "takes at least 119.7 GiB of each GPU" in said
    assert "the largest here has 80.0 GiB; choose a smaller model, strategy=zero3 or fsdp" in said


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=zero3", "precision=bf16"],
        ["strategy=fsdp", "precision=fp32"],
        ["strategy=zero3_nvme", "strategy.nvme_path=/d", "precision=bf16"],
    ],
)
def test_what_may_fit_is_not_refused(overrides: list[str]) -> None:
    gpus = {"compute_capabilities": (9.0,) * 8, "gpu_memory_bytes": 80 * GIB}
    assert list(memory.problems(*run(*overrides, memory_bytes=64 * GIB, **gpus))) == []
    assert list(memory.problems(*run(*overrides))) == [], "nothing is known of this machine"
