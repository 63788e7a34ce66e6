"""A planted spike is found on all ranks alike, and what it would have done is not done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.train.checkpoint.format import layout
from shardwright.train.run_directory import rollbacks, stop_note
from tests.distributed.curves import curve, lines
from tests.distributed.interrupted import interrupted
from tests.distributed.optimizers import needs_torchao
from tests.distributed.spikes import (
    Planted,
    by_hand,
    changed_by,
    run_stopped_at_a_spike,
    run_with_spikes,
)
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

BATCH, STEPS, WINDOW = 16, 16, 8
SPIKE = 13
"""The step that meets the spoilt samples."""
SAVED = 10
"""The newest checkpoint before it; the next one is that of step 15."""
PLANTED: Planted = [((SPIKE - 1) * BATCH, SPIKE * BATCH)]
BEHIND = SPIKE * BATCH
"""The position after the spoilt samples."""

Spiky = Callable[..., Path]


@pytest.fixture
def spiky(tiny_tree: TreeOf, frozen_run: Freeze) -> Spiky:
    """Return a function that freezes a run whose steps are watched."""

    def freeze(
        name: str, on_spike: str, precision: dict[str, Any] | None = None, **trainer: Any
    ) -> Path:
        tree = tiny_tree("clm")
        tree["strategy"], tree["precision"] = STRATEGIES[name], precision or {}
        tree["launcher"]["nproc_per_node"] = 1 if name == "single" else 2
        if on_spike != "ignore":
            tree["trainer"] |= {"spike_window_steps": WINDOW, "spike_factor": 5.0}
        tree["trainer"] |= {
            "max_steps": STEPS,
            "global_batch_size": BATCH,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "save_every_steps": 5,
            "on_spike": on_spike,
            **trainer,
        }
        tree["checkpoint"] = {"keep_last": 9}
        return frozen_run(tree)

    return freeze


@pytest.fixture(scope="module")
def references() -> dict[str, list[float]]:
    """Return the losses that were computed by hand, which the engines share."""
    return {}


@pytest.fixture
def reference(references: dict[str, list[float]], spiky: Spiky, ranks: RanksOf) -> Any:
    """Return a function that gives the losses by hand of a run that does this about the spike."""
    positions = [step * BATCH for step in range(STEPS)]
    behind = [BEHIND + step * BATCH for step in range(STEPS - SAVED)]
    plans = {
        "skip_update": [(at, (at, at + BATCH) != PLANTED[0]) for at in positions],
        # As if the samples from the checkpoint to behind the spike had never been there.
        "rollback": [(at, True) for at in positions[:SAVED] + behind],
    }

    def losses(on_spike: str) -> list[float]:
        if on_spike not in references:
            # The head as it is, so that its logits can be had.
            run_dir = spiky("single", "ignore", fused_loss=False)
            references[on_spike] = ranks(1)(by_hand, run_dir, PLANTED, plans[on_spike])[0]
        return references[on_spike]

    return losses


def content(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what is another each time."""
    varying = ("time", "tokens_per_second", "sent_bytes_per_second", "peak_memory_bytes")
    timed = ("compute_", "wait_", "data_")  # what each rank's steps were spent on
    return [
        {k: v for k, v in line.items() if k not in varying and not k.startswith(timed)}
        for line in lines(run_dir)
    ]


def spikes(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in content(run_dir) if "spike" in line]


@pytest.mark.parametrize("name", ["single", "zero2", "fsdp"])
def test_skipping_and_going_back_give_the_losses_by_hand_and_a_resume_repeats_them(
    name: str, spiky: Spiky, reference: Any, ranks: RanksOf, tmp_path: Path
) -> None:
    rounding = 1e-5 if name == "single" else 1e-3
    run = ranks(1 if name == "single" else 2)

    skipping = spiky(name, "skip_update")
    text = run(run_with_spikes, skipping, PLANTED)[0]
    assert "step 13 is a spike: the loss 7.3" in text
    assert "; its update was left out\n" in text
    assert curve(skipping) == pytest.approx(reference("skip_update"), rel=rounding)
    (event,) = spikes(skipping)
    found = (event["step"], event["samples"], event["spike"], event["spike_step"])
    assert found == (SPIKE, SPIKE * BATCH, "skip_update", SPIKE)
    assert event["spike_loss"] > event["spike_loss_limit"]
    assert event["spike_grad_norm"] > event["spike_grad_norm_limit"]

    going_back = spiky(name, "rollback")
    text = run(run_with_spikes, going_back, PLANTED)[0]
    assert "; going back from step 13 to checkpoint-10, past 48 samples\n" in text
    assert "resuming from checkpoint-10\n" in text
    assert curve(going_back) == pytest.approx(reference("rollback"), rel=rounding)
    (event,) = spikes(going_back)
    found = (event["step"], event["samples"], event["spike"], event["spike_step"])
    assert found == (SAVED, BEHIND, "rollback", SPIKE)
    assert event["spike_skipped_samples"] == BEHIND - SAVED * BATCH
    manifest = layout.read_manifest(going_back / "checkpoints/checkpoint-15")
    assert manifest.samples == BEHIND + 5 * BATCH

    # The spike comes after the first checkpoint and before the second.
    for source, step in ((skipping, SAVED), (going_back, SAVED), (going_back, 15)):
        resumed = interrupted(source, tmp_path / f"{source.name}-{step}", step=step)
        if (source / "rollbacks.jsonl").exists():
            shutil.copy(source / "rollbacks.jsonl", resumed)
        run(run_with_spikes, resumed, PLANTED)
        assert content(resumed) == content(source)
        kept = (resumed / "rollbacks.jsonl").exists() and rollbacks.read(resumed)
        assert kept == ((source / "rollbacks.jsonl").exists() and rollbacks.read(source))


PURE = dict.fromkeys(("compute_dtype", "reduce_dtype", "master_dtype", "moments_dtype"), "bf16")
BF16 = {"compute_dtype": "bf16"}
# With the scale that is usual the gradients of the spike overflow: then it is the scale that has
# the step skipped, and no spike.
FP16 = {"compute_dtype": "fp16", "initial_loss_scale": 256.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "trainer"),
    [
        *((name, {}, {}) for name in ("ddp", "zero0", "zero1", "zero3")),
        *((name, {}, {}) for name in ("zero2_offload", "zero3_offload", "fsdp_offload")),
        ("zero3_many_groups", {}, {}),
        ("zero0", {}, {"max_grad_norm": 0.0}),
        *((name, BF16, {}) for name in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp")),
        *((name, PURE, {}) for name in ("ddp", "fsdp")),
        *((name, FP16, {}) for name in ("ddp", "zero0", "zero1", "zero2", "zero3")),
        ("zero2_offload", FP16, {}),
        # Its norms vary more.
        *(("ddp", p, {"optimizer": "adafactor", "spike_factor": 12.0}) for p in ({}, FP16)),
        ("fsdp", {}, {"optimizer": "muon"}),
        pytest.param("ddp", {}, {"optimizer": "adamw_8bit"}, marks=needs_torchao),
    ],
    ids=str,
)
def test_every_engine_leaves_the_weights_alone_in_that_step_alone(
    name: str, precision: dict[str, Any], trainer: dict[str, Any], spiky: Spiky, ranks: RanksOf
) -> None:
    run_dir = spiky(name, "skip_update", precision, **trainer)
    for changed in ranks(2)(changed_by, run_dir, PLANTED):
        steps = [step for step, has in enumerate(changed, start=1) if not has]
        assert steps == [SPIKE]
    assert [event["spike_step"] for event in spikes(run_dir)] == [SPIKE]


def test_a_run_goes_back_no_more_often_than_it_may(spiky: Spiky, ranks: RanksOf) -> None:
    run_dir = spiky("single", "rollback", max_rollbacks=1)
    # The second time step 12 meets some.
    planted = [*PLANTED, (BEHIND + BATCH, BEHIND + 2 * BATCH)]
    text = ranks(1)(run_with_spikes, run_dir, planted)[0]
    assert "step 12 is a spike: the loss " in text
    assert text.endswith(
        ", and the run has gone back once already (trainer.max_rollbacks=1). checkpoint-10 is the "
        "newest checkpoint before it; resume with a lower trainer.learning_rate, with a larger "
        "trainer.spike_factor where such steps do no harm, or with trainer.max_rollbacks=2"
    )
    assert [each.step for each in rollbacks.read(run_dir)] == [SPIKE]

    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree["trainer"]["max_rollbacks"] = 2
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    ranks(1)(run_with_spikes, run_dir, planted)
    found = [(e.step, e.to_step, e.samples, e.skipped_samples) for e in rollbacks.read(run_dir)]
    assert found == [(13, 10, BEHIND, 48), (12, 10, BEHIND + 2 * BATCH, 32)]
    assert [e["spike_skipped_samples"] for e in spikes(run_dir)] == [48, 32]
    assert [line["step"] for line in lines(run_dir) if "loss" in line] == [*range(1, STEPS + 1)]
    assert lines(run_dir)[-1]["samples"] == BEHIND + 2 * BATCH + (STEPS - SAVED) * BATCH


def test_what_is_only_warned_of_is_trained_on(spiky: Spiky, ranks: RanksOf) -> None:
    """And so is a spike that comes before there is a checkpoint to go back to."""
    warning, early = spiky("single", "warn"), spiky("single", "rollback", save_every_steps=15)
    text = ranks(1)(run_with_spikes, warning, PLANTED)[0]
    assert "; training continues\n" in text
    text = ranks(1)(run_with_spikes, early, PLANTED)[0]
    assert "; training continues, as there is no checkpoint yet to go back to\n" in text
    assert content(warning) == content(early)
    assert [event["spike"] for event in spikes(early)] == ["warn"]
    assert not (early / "rollbacks.jsonl").exists()


def test_a_run_that_stops_at_a_spike_goes_back_when_it_is_resumed(
    spiky: Spiky, ranks: RanksOf
) -> None:
    run_dir, undisturbed = spiky("single", "rollback"), spiky("single", "rollback")
    ranks(1)(run_stopped_at_a_spike, run_dir, PLANTED)
    where = stop_note.read(run_dir)
    assert where is not None
    assert where.checkpoint == str(run_dir / f"checkpoints/checkpoint-{SAVED}")
    assert where.unsaved is not None
    assert where.unsaved.endswith("going back from step 13 to checkpoint-10, past 48 samples")

    for each in (run_dir, undisturbed):
        ranks(1)(run_with_spikes, each, PLANTED)
    assert content(run_dir) == content(undisturbed)
