"""What only CUDA shows of one rank; on a CPU the same tests run, and show that they can."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardwright.train.config import load
from shardwright.train.process import leave
from tests.distributed.curves import curve
from tests.distributed.faults import trained_with_a_fault
from tests.distributed.interrupted import SAVED, STEPS, interrupted
from tests.distributed.jobs import whole_run
from tests.distributed.optimizers import needs_compiler
from tests.distributed.pool import Ranks
from tests.fixtures import Freeze, TreeOf
from tests.gpu.jobs import (
    as_the_second_task_of_a_node,
    failed_alone,
    pinned_while_saving,
    problems_of_the_machine,
    where_parameters_lie,
)
from tests.strategies import STRATEGIES
from tests.waits import waits_of_a_step

Run = Callable[..., Path]
RankOn = Callable[[str], Ranks]

NVME = {
    "kind": "zero",
    "stage": 3,
    "offload_optimizer": "nvme",
    "offload_parameters": "nvme",
    "nvme_buffer_elements": 1_300_000,
    "sub_group_elements": 600_000,
}


def on_both(*names: str, often: str = "", **marks: pytest.MarkDecorator) -> list[Any]:
    """Return each case on a GPU, and on a CPU as a rehearsal: ``often`` in the default suite."""
    more = list(marks.values())
    on_gpu = [pytest.param("cuda", name, marks=[pytest.mark.gpu, *more]) for name in names]
    rehearsals = [
        pytest.param(
            "cpu",
            name,
            marks=[
                pytest.mark.distributed,
                *([] if name == often else [pytest.mark.slow]),
                *more,
            ],
        )
        for name in names
    ]
    return on_gpu + rehearsals


@pytest.fixture
def new_run(tiny_tree: TreeOf, frozen_run: Freeze, skip_where_lacking: Callable[..., None]) -> Run:
    """Return a function that freezes a run of one rank, or skips the test where it cannot run.

    A CPU is asked for nothing: its tests patch what refuses a precision there, or leave it out.
    """

    def freeze(device: str, strategy: dict[str, Any], **sections: dict[str, Any]) -> Path:
        tree = tiny_tree("clm")
        tree["strategy"] = strategy
        tree["trainer"]["compile"] = False  # which takes longer than such a run
        tree["launcher"] |= {"device": device, "nproc_per_node": 1}
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        run_dir = frozen_run(tree)
        if device == "cuda":
            skip_where_lacking(device, load(run_dir).precision)
        return run_dir

    return freeze


@pytest.fixture
def new_rank() -> Iterator[Callable[[], Ranks]]:
    """Return a function that makes a rank in a process of its own, in which CUDA starts anew."""
    made: list[Ranks] = []

    def make() -> Ranks:
        made.append(Ranks(1, may_use_a_gpu=torch.cuda.is_available()))
        return made[-1]

    yield make
    for rank in made:
        rank.stop()


# --- offload ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "precision"), on_both("fp32", "bf16", often="bf16"))
def test_fsdp_trains_parameters_that_stay_in_host_memory(
    device: str, precision: str, new_run: Run, rank_on: RankOn
) -> None:
    """Nothing may move the model where FSDP has placed it: the first pass would raise."""
    dtype = {"compute_dtype": precision}
    trainer = {"max_steps": 6, "max_grad_norm": 1.0}
    run_dir = new_run(device, STRATEGIES["fsdp_offload"], precision=dtype, trainer=trainer)
    kept = new_run(device, STRATEGIES["fsdp"], precision=dtype, trainer=trainer)
    (found,) = rank_on(device)(where_parameters_lie, run_dir)
    assert found == {"parameters": {"cpu"}, "logits": {device}}
    rank_on(device)(whole_run, kept)
    assert curve(run_dir) == pytest.approx(curve(kept), abs=2e-3)
    assert curve(run_dir)[-1] < curve(run_dir)[0]


@pytest.mark.timeout(1500)  # that of a cold compiler
@pytest.mark.parametrize(("device", "precision"), on_both("fp32", "bf16"))
def test_zero_3_trains_from_a_disk(
    device: str, precision: str, new_run: Run, rank_on: RankOn, tmp_path: Path
) -> None:
    """It is skipped with what the check before a run says of this machine."""
    sections = {
        "model": {"intermediate_size": 40_001},
        "precision": {"compute_dtype": precision},
        "trainer": {"max_steps": 4},
    }
    disk = tmp_path / "disk"
    disk.mkdir()
    run_dir = new_run(device, {**NVME, "nvme_path": str(disk)}, **sections)
    if problems := problems_of_the_machine(run_dir):
        pytest.skip("; ".join(problems))
    in_memory = new_run(device, STRATEGIES["zero3"], **sections)
    # The operator is compiled the first time.
    rank_on(device)(whole_run, run_dir, timeout_seconds=1200)
    rank_on(device)(whole_run, in_memory)
    assert curve(run_dir) == pytest.approx(curve(in_memory), abs=1e-4)
    engine = json.loads((run_dir / "engine.json").read_text())
    assert engine["offload_parameters"] == "nvme"
    assert engine["optimizer_elements_on_nvme"] > 1_000_000


# --- what it waits for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "case"),
    on_both("single-clm", "single-mlm", "ddp-clm", "fsdp-clm", "fsdp-mlm", often="single-mlm"),
)
def test_no_step_waits_for_the_gpu(
    device: str, case: str, tiny_tree: TreeOf, new_run: Run, rank_on: RankOn
) -> None:
    strategy, objective = case.split("-")
    sections = {name: tiny_tree(objective)[name] for name in ("model", "objective", "data")}
    sections["data"]["eval_fraction"] = 0
    run_dir = new_run(
        device,
        STRATEGIES[strategy],
        **sections,
        precision={"compute_dtype": "bf16"},
        trainer={"max_steps": 3, "log_every_steps": 100},
    )
    assert rank_on(device)(waits_of_a_step, run_dir) == [{}]


# --- how it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "strategy"),
    on_both("single", "ddp", "zero0", "zero2", "zero3", "fsdp", "fsdp_offload"),
)
def test_an_overflow_in_fp16_is_skipped_and_the_schedule_goes_on(
    device: str, strategy: str, new_run: Run, rank_on: RankOn
) -> None:
    trainer = {"max_steps": 8, "lr_scheduler": "linear", "save_every_steps": 8}
    precision = {"compute_dtype": "fp16", "initial_loss_scale": 8.0}
    run_dir = new_run(device, STRATEGIES[strategy], precision=precision, trainer=trainer)

    (found,) = rank_on(device)(trained_with_a_fault, run_dir, "gradient", 3, 0)

    assert (found["error"], found["step"], found["scheduled"]) == (None, 8, 8)
    assert found["loss_scale"] == 4.0
    peak = load(run_dir).trainer.learning_rate
    rates = [peak * (8 - step) / 8 for step in range(8)]
    assert curve(run_dir, "learning_rate") == pytest.approx(rates)
    # The losses of the steps around it are finite, and those of fp32.
    exact = new_run(device, STRATEGIES["single"], trainer={**trainer, "max_steps": 3})
    rank_on(device)(whole_run, exact)
    assert curve(run_dir)[:3] == pytest.approx(curve(exact), abs=5e-3)
    assert curve(run_dir)[-1] < curve(run_dir)[0]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("device", "strategy"), on_both("single", "fsdp", "zero2", needs_compiler=needs_compiler)
)
def test_compiled_blocks_compute_in_tf32(
    device: str, strategy: str, new_run: Run, rank_on: RankOn
) -> None:
    """A CPU has no TF32, and reads back that there is none."""
    on_gpu = device == "cuda"
    compiled = new_run(
        device,
        STRATEGIES[strategy],
        precision={"allow_tf32": on_gpu},
        trainer={"max_steps": 6, "compile": "auto" if on_gpu else True},
    )
    plain = new_run(device, STRATEGIES[strategy], trainer={"max_steps": 6})
    rank_on(device)(whole_run, compiled, timeout_seconds=600)
    rank_on(device)(whole_run, plain)
    facts = {path: json.loads((path / "engine.json").read_text()) for path in (compiled, plain)}
    assert (facts[compiled]["tf32"], facts[plain]["tf32"]) == (on_gpu, False)
    assert facts[compiled]["compiled_blocks"] == 2
    assert facts[compiled]["compilation"]["graphs"] >= 1
    assert facts[compiled]["compilation"]["graph_breaks"] == {}
    assert curve(compiled) == pytest.approx(curve(plain), abs=2e-3)


@pytest.mark.parametrize(("device", "strategy"), on_both("single", "ddp", "zero2", "zero3", "fsdp"))
def test_two_runs_and_a_resumed_one_have_the_same_bits(
    device: str, strategy: str, new_run: Run, new_rank: Callable[[], Ranks], tmp_path: Path
) -> None:
    first, second = (
        new_run(
            device,
            STRATEGIES[strategy],
            # Large enough for flash attention, whose backward pass adds up in any order.
            model={"hidden_size": 256, "num_attention_heads": 4, "dropout": 0.1},
            precision={"compute_dtype": "bf16"},
            trainer={"max_steps": STEPS, "save_every_steps": SAVED, "deterministic": True},
        )
        for _ in range(2)
    )
    one, other = new_rank(), new_rank()
    one(whole_run, first)
    other(whole_run, second)
    resumed = interrupted(first, tmp_path / "resumed")
    other(whole_run, resumed)

    weights = load_file(first / "final/model.safetensors")
    for run_dir in (second, resumed):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert curve(run_dir, key) == curve(first, key), key
        found = load_file(run_dir / "final/model.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


# --- devices, memory and groups -----------------------------------------------------------------


@pytest.mark.parametrize(("device", "strategy"), on_both("single", "ddp", "zero2", "zero3", "fsdp"))
def test_the_second_task_of_a_node_takes_the_one_gpu_that_it_sees(
    device: str,
    strategy: str,
    new_run: Run,
    new_rank: Callable[[], Ranks],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", first)
    run_dir = new_run(device, STRATEGIES[strategy], trainer={"max_steps": 2})
    (found,) = new_rank()(as_the_second_task_of_a_node, run_dir)
    assert found == {"in_sight": 1, "current": 0, "devices": {f"{device}:0"}, "steps": 2}


@pytest.mark.parametrize(
    ("device", "strategy"), on_both("single", "zero2", "zero3", "fsdp", often="fsdp")
)
def test_saves_in_the_background_pin_no_more_than_one_copy(
    device: str, strategy: str, new_run: Run, rank_on: RankOn
) -> None:
    run_dir = new_run(
        device,
        STRATEGIES[strategy],
        model={"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024},
        trainer={"max_steps": 6, "save_every_steps": 1},
        checkpoint={"async": True, "keep_last": 1},
    )
    (found,) = rank_on(device)(pinned_while_saving, run_dir)
    copy_bytes = 12 * found["parameters"]  # weights and two moments, in fp32
    assert len(found["pinned"]) == 6
    if device == "cuda":
        assert max(found["pinned"]) > 0, "nothing was pinned"
    # CUDA rounds each piece up to a power of two.
    assert max(found["pinned"]) < 2 * copy_bytes + 2**20
    assert found["pinned"][-1] <= found["pinned"][1], "each save takes more"


@pytest.mark.parametrize(("device", "strategy"), on_both("ddp", "zero2", "fsdp", often="fsdp"))
def test_a_rank_that_fails_leaves_its_group_and_can_make_another(
    device: str, strategy: str, new_run: Run, rank_on: RankOn
) -> None:
    """One GPU takes one rank of NCCL, so that no peer is left waiting here."""
    (seconds,) = rank_on(device)(
        failed_alone, new_run(device, STRATEGIES[strategy], trainer={"max_steps": 3})
    )
    assert seconds < leave.TIMEOUT_SECONDS
    again = new_run(device, STRATEGIES[strategy], trainer={"max_steps": 3})
    rank_on(device)(whole_run, again)
    assert len(curve(again)) == 3
