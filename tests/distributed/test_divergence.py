"""A step that is not finite reaches neither weights nor checkpoints, and ends the run in words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.train.checkpoint.format import layout
from shardwright.train.config import load
from shardwright.train.loop.trainer import Trainer
from shardwright.train.strategy.finite import are_sound
from tests.checkpoints import rewrite_manifest
from tests.distributed.curves import curve
from tests.distributed.faults import first_batch_is_refused, trained_with_a_fault
from tests.distributed.jobs import trained, whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"compute_dtype": "bf16"},
    "bf16_pure": {
        "compute_dtype": "bf16",
        "reduce_dtype": "bf16",
        "master_dtype": "bf16",
        "moments_dtype": "bf16",
    },
}
SPOILT = 3
"""The step that is spoilt, on rank 1 alone."""
SAID = {
    "loss": "the loss is inf on rank 1.",
    "gradient": "the gradient norm is (NaN|inf), and the loss is finite.",
    "update": "its update on rank 1 left weights that are NaN, infinite or too large",
}
ENGINES = (
    "ddp",
    "zero0",
    "zero1",
    "zero2",
    "zero2_offload",
    "zero3",
    "zero3_offload",
    "fsdp",
    "fsdp_hybrid",
    "fsdp_offload",
)


QUICK = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp")
"""Each decides by itself what it does with gradients that are not finite."""


def combinations() -> Iterator[Any]:
    """Yield engine, precision and fault: all engines' own checks, the full product as slow."""
    for engine in ENGINES:
        for precision in PRECISIONS:
            if precision == "bf16_pure" and engine in ("zero0", "zero2_offload", "zero3_offload"):
                continue  # refused
            for fault in SAID:
                if fault == "gradient":
                    is_quick = precision != "bf16_pure" and engine in QUICK
                else:
                    is_quick = precision == "fp32" and engine in ("ddp", "zero3", "fsdp")
                marks = [] if is_quick else [pytest.mark.slow]
                yield pytest.param(engine, precision, fault, marks=marks)


@pytest.mark.parametrize(("engine", "precision", "fault"), combinations())
def test_what_is_not_finite_reaches_no_weight_and_no_checkpoint(
    engine: str,
    precision: str,
    fault: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES[engine]
    tree["precision"] = PRECISIONS[precision]
    tree["data"]["eval_fraction"] = 0.0
    # A save at the spoilt step looks at the weights; without it the next step's start tells.
    saves = {"save_every_steps": 1 if fault == "update" else 2}
    clip = {"max_grad_norm": 0.0 if precision == "fp32" else 1.0}
    tree["trainer"] |= {"max_steps": 8, "log_every_steps": 100, **saves, **clip}
    tree["checkpoint"] = {"keep_last": 1}
    world_size = 4 if "hybrid" in engine else 2
    tree["launcher"]["nproc_per_node"] = world_size
    run_dir = frozen_run(tree)

    seen = ranks(world_size)(trained_with_a_fault, run_dir, fault, SPOILT, 1)

    for found in seen:
        assert re.match(f"training has diverged at step {SPOILT}: {SAID[fault]}", found["error"])
        assert "checkpoint-2 is the newest checkpoint, and its weights are" in found["error"]
        assert found["step"] == SPOILT
        # Of an update nothing can be known before it is made: no save gets to see it.
        assert found["weights_are_as_before"] == (fault != "update")
    assert layout.whole_checkpoints(run_dir / "checkpoints") == [
        (2, run_dir / "checkpoints" / "checkpoint-2")
    ]
    assert layout.verify(run_dir / "checkpoints" / "checkpoint-2") == []


def test_the_save_in_flight_is_finished_and_named(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES["fsdp"]
    tree["trainer"] |= {"max_steps": 8, "save_every_steps": 2}
    tree["checkpoint"] = {"keep_last": 1, "async": True}
    run_dir = frozen_run(tree)
    for found in ranks(2)(trained_with_a_fault, run_dir, "gradient", SPOILT, 1):
        assert "checkpoint-2 is the newest checkpoint" in found["error"]
    assert layout.verify(run_dir / "checkpoints" / "checkpoint-2") == []


# --- fp16 ----------------------------------------------------------------------------------------

SCALED = ("ddp", "zero0", "zero2", "zero3", "fsdp")


@pytest.fixture
def fp16_run(tiny_tree: TreeOf, frozen_run: Freeze) -> Callable[..., Path]:
    """Return a function that freezes a run whose loss scale is 8 and does not grow."""

    def freeze(engine: str, **trainer: Any) -> Path:
        tree = tiny_tree("clm")
        tree["strategy"] = STRATEGIES[engine]
        tree["data"]["eval_fraction"] = 0.0
        tree["precision"] = {"compute_dtype": "fp16", "initial_loss_scale": 8.0}
        tree["trainer"] |= {"max_steps": 8, "save_every_steps": 1, "log_every_steps": 100}
        tree["trainer"] |= trainer
        tree["checkpoint"] = {"keep_last": 1}
        tree["launcher"]["nproc_per_node"] = 1 if engine == "single" else 2
        return frozen_run(tree)

    return freeze


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    # GradScaler itself skips the step of an optimizer whose kernels cannot: accelerate takes no
    # other step for a skipped one.
    [("single", "adamw"), *((engine, "adamw") for engine in SCALED), ("ddp", "adafactor")],
)
def test_an_overflow_in_fp16_is_skipped_and_the_run_continues(
    engine: str, optimizer: str, fp16_run: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = fp16_run(engine, optimizer=optimizer, lr_scheduler="linear", log_every_steps=1)
    world_size = 1 if engine == "single" else 2
    for found in ranks(world_size)(
        trained_with_a_fault, run_dir, "gradient", SPOILT, world_size - 1
    ):
        assert (found["error"], found["step"], found["loss_scale"]) == (None, 8, 4.0)
        assert found["scheduled"] == 8
    # Whether its update was skipped or not, step k has the k-th rate of the schedule.
    peak = load(run_dir).trainer.learning_rate
    assert curve(run_dir, "learning_rate") == pytest.approx(
        [peak * (8 - step) / 8 for step in range(8)]
    )
    ((step, checkpoint),) = layout.whole_checkpoints(run_dir / "checkpoints")
    assert step == torch.load(checkpoint / "scheduler.pt", weights_only=True)["last_epoch"] == 8


@pytest.mark.parametrize("engine", SCALED)
def test_overflows_that_no_loss_scale_ends_end_the_run(
    engine: str, fp16_run: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = fp16_run(engine)
    for found in ranks(2)(trained_with_a_fault, run_dir, "gradient", SPOILT, 1, True):
        # By then the scale has come from 8 to 1.
        assert re.search("diverged at step 5: the gradient norm is (NaN|inf), and", found["error"])
        assert found["loss_scale"] == 1.0
        assert found["weights_are_as_before"]
    assert [step for step, _ in layout.whole_checkpoints(run_dir / "checkpoints")] == [4]


@pytest.mark.parametrize("engine", SCALED)
def test_a_loss_that_is_not_finite_is_no_overflow(
    engine: str, fp16_run: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = fp16_run(engine)
    for found in ranks(2)(trained_with_a_fault, run_dir, "loss", SPOILT, 1):
        assert "diverged at step 3: the loss is inf on rank 1. " in found["error"]
        assert found["weights_are_as_before"]
    assert [step for step, _ in layout.whole_checkpoints(run_dir / "checkpoints")] == [2]


# --- checkpoints of which nobody has looked whether they are finite -------------------------------


@pytest.mark.parametrize("says", [None, False])
@pytest.mark.parametrize("engine", ["zero2", "fsdp"])
def test_a_run_resumes_from_before_weights_that_are_not_finite_and_says_so(
    engine: str,
    says: bool | None,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES[engine]
    tree["trainer"] |= {"max_steps": 4, "save_every_steps": 1}
    tree["checkpoint"] = {"keep_last": 4}
    run_dir = frozen_run(tree)
    ranks(2)(trained_with_a_fault, run_dir, "update", SPOILT, 1, False, True)
    checkpoints = run_dir / "checkpoints"
    spoilt = [checkpoints / "checkpoint-3", checkpoints / "checkpoint-4"]
    for path in spoilt:
        assert layout.verify(path) == []
        rewrite_manifest(path, lambda tree: {**tree, "finite": says})

    text = ranks(2)(whole_run, run_dir)[0]

    for step in (3, 4):
        assert f"checkpoint-{step} cannot be used: its weights are not finite; skipped\n" in text
    assert "resuming from checkpoint-2\n" in text
    assert (run_dir / "final/model.safetensors").is_file()
    # They have been written anew.
    assert all(layout.read_manifest(path).finite for path in spoilt)
    assert [step for step, _ in layout.whole_checkpoints(checkpoints)] == [1, 2, 3, 4]


# --- held-out losses ------------------------------------------------------------------------------


@pytest.fixture
def evaluated_run(tiny_tree: TreeOf, frozen_run: Freeze) -> Callable[..., Path]:
    """Return a function that freezes a run of 5 steps, saved after every second."""

    def freeze(**trainer: Any) -> Path:
        tree = tiny_tree("clm")
        tree["trainer"] |= {"max_steps": 5, "save_every_steps": 2, **trainer}
        tree["checkpoint"] = {"keep_last": 5}
        return frozen_run(tree)

    return freeze


def test_one_held_out_loss_that_is_not_finite_is_told_and_is_not_the_best(
    evaluated_run: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = evaluated_run(eval_every_steps=2)
    first, other = ranks(2)(trained_with_a_fault, run_dir, "held_out", 4, 1)
    assert (first["error"], other["error"], first["step"]) == (None, None, 5)
    assert re.search(
        r"^warning: the held-out loss at step 4 is inf, in \d of \d batches, while the weights are "
        r"finite; it does not count for the best checkpoint, and if the next evaluation is not "
        r"finite either, the run ends$",
        first["text"],
        re.MULTILINE,
    )
    assert "warning" not in other["text"]
    found = [
        layout.read_manifest(path).metrics.get("eval_loss")
        for _, path in layout.whole_checkpoints(run_dir / "checkpoints")
    ]
    assert [loss is not None for loss in found] == [True, False, True], "at steps 2, 4 and 5"


def test_held_out_losses_that_stay_not_finite_end_the_run_with_a_checkpoint(
    evaluated_run: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = evaluated_run(eval_every_steps=1)
    for found in ranks(2)(trained_with_a_fault, run_dir, "held_out", 2, 1, True):
        assert re.match(
            r"the held-out loss at step 3 is inf, in \d of \d batches, and at step 2 it was inf, "
            r"while the weights are finite\. ",
            found["error"],
        )
        assert found["error"].endswith(f"resume with: shardwright resume {run_dir}")
    assert [step for step, _ in layout.whole_checkpoints(run_dir / "checkpoints")] == [2, 3]


def test_a_last_held_out_loss_that_is_not_finite_is_an_error(
    evaluated_run: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = evaluated_run()
    for attempt in range(2):  # resumed, it evaluates again
        for found in ranks(2)(trained_with_a_fault, run_dir, "held_out", 1, 1, True):
            assert found["error"].startswith("the held-out loss at step 5 is inf, "), attempt
    assert [step for step, _ in layout.whole_checkpoints(run_dir / "checkpoints")] == [2, 4, 5]


# --- the first batch ------------------------------------------------------------------------------


def test_ids_beyond_the_embedding_are_refused_before_the_first_step(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    run_dir = frozen_run(tiny_tree("mlm"))
    for said, steps in ranks(2)(first_batch_is_refused, run_dir):
        assert re.match(r"the first batch has the token id 1\d\d\d in input_ids, and the", said)
        assert steps == 0


# --- what is no weight ----------------------------------------------------------------------------


def nan_in_padding(trainer: Trainer) -> tuple[int, bool]:
    """Make NaN of what no weight lies in; return how much that is, and whether all is sound."""

    def weights() -> list[torch.Tensor]:
        return list(trainer.engine.local_weights(trainer))

    kept = [tensor.clone() for tensor in weights()]
    partitions = trainer.model_wrapped.optimizer.fp32_partitioned_groups_flat
    for flat in partitions:
        flat.data.fill_(math.nan)
    for tensor, values in zip(weights(), kept, strict=True):
        tensor.data.copy_(values)
    padded = sum(int(flat.isnan().sum()) for flat in partitions)
    return padded, bool(are_sound(weights(), torch.device("cpu"), 2.0**64))


def test_what_pads_a_partition_is_not_taken_for_a_weight(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    """DeepSpeed leaves there what its memory held before."""
    tree = tiny_tree("clm")
    tree["model"]["hidden_size"], tree["model"]["num_attention_heads"] = 30, 3
    tree["strategy"] = STRATEGIES["zero3"]
    tree["launcher"]["nproc_per_node"] = 4
    tree["trainer"] |= {"max_steps": 1, "micro_batch_size": 4}
    found = ranks(4)(trained, frozen_run(tree), nan_in_padding)
    assert sum(padded for padded, _ in found) > 0
    assert all(sound for _, sound in found)
