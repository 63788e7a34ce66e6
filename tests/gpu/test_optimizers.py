"""Each optimizer on one GPU: its own kernels, the same learning as on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.config import load
from shardwright.train.loop.trainer import Trainer
from tests.distributed.curves import curve
from tests.distributed.jobs import trained, whole_run
from tests.distributed.optimizers import OPTIMIZERS, needs_compiler, needs_torchao
from tests.distributed.pool import Ranks
from tests.fixtures import Freeze, TreeOf

pytestmark = pytest.mark.gpu

RankOn = Callable[[str], Ranks]
Run = Callable[..., Path]
OFFLOAD = {"kind": "zero", "stage": 2, "offload_optimizer": "cpu"}
CASES = [
    pytest.param(name, strategy, marks=needs_torchao if name == "adamw_8bit" else ())
    for name, strategies in {
        "adamw": ("single", "fsdp"),
        "adafactor": ("single",),
        "muon": ("single", "fsdp"),
        "adamw_8bit": ("single", "fsdp"),
    }.items()
    for strategy in strategies
]


@pytest.fixture
def new_run(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    skip_where_lacking: Callable[..., None],
) -> Run:
    """Return a function that freezes a run of one rank, or skips the test where it cannot run."""

    def freeze(device: str, name: str, strategy: dict[str, Any], **trainer: Any) -> Path:
        tree = tiny_tree("clm")
        tree["strategy"] = strategy
        tree["trainer"] |= {"compile": False, **OPTIMIZERS[name], **trainer}
        tree["launcher"] |= {"device": device, "nproc_per_node": 1}
        run_dir = frozen_run(tree)
        skip_where_lacking(device, load(run_dir).precision)
        return run_dir

    return freeze


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_it_learns_on_a_gpu_what_it_learns_on_a_cpu(
    name: str, strategy: str, new_run: Run, rank_on: RankOn
) -> None:
    on_gpu = new_run("cuda", name, {"kind": strategy})
    on_cpu = new_run("cpu", name, {"kind": "single"})
    rank_on("cuda")(whole_run, on_gpu)
    rank_on("cpu")(whole_run, on_cpu)
    assert curve(on_gpu)[-1] < curve(on_gpu)[0] - 0.1, "nothing was learned"
    assert curve(on_gpu) == pytest.approx(curve(on_cpu), abs=2e-3)


def look_at_optimizer(trainer: Trainer) -> dict[str, Any]:
    optimizer = trainer.innermost_optimizer()
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    moments = [value for value in state if getattr(value, "ndim", 0) > 0]
    return {
        "class": type(optimizer).__name__,
        "fused": {group.get("fused") for group in optimizer.param_groups},
        "moment_classes": {type(moment).__name__ for moment in moments},
        "devices": {moment.device.type for moment in moments},
    }


def test_adamw_is_fused_on_the_gpu(new_run: Run, rank_on: RankOn) -> None:
    run_dir = new_run("cuda", "adamw", {"kind": "single"}, max_steps=2)
    (seen,) = rank_on("cuda")(trained, run_dir, look_at_optimizer)
    assert (seen["class"], seen["fused"], seen["devices"]) == ("AdamW", {True}, {"cuda"})


@needs_torchao
def test_moments_are_8_bits_on_the_gpu(new_run: Run, rank_on: RankOn) -> None:
    run_dir = new_run("cuda", "adamw_8bit", {"kind": "single"}, max_steps=2)
    (seen,) = rank_on("cuda")(trained, run_dir, look_at_optimizer)
    assert seen["class"] == "AdamW8bit"
    assert "OptimState8bit" in seen["moment_classes"]
    assert seen["devices"] == {"cuda"}


@pytest.mark.parametrize(
    ("whose", "name"),
    [("torch", "AdamW"), pytest.param("deepspeed", "DeepSpeedCPUAdam", marks=needs_compiler)],
)
def test_an_offloaded_optimizer_lives_in_host_memory(
    whose: str, name: str, new_run: Run, rank_on: RankOn
) -> None:
    run_dir = new_run("cuda", "adamw", {**OFFLOAD, "cpu_adam": whose}, max_steps=2)
    (seen,) = rank_on("cuda")(trained, run_dir, look_at_optimizer)
    assert (seen["class"], seen["devices"]) == (name, {"cpu"})
