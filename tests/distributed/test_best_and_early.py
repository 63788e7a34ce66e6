"""Runs that stop early, keep their best checkpoint, and end with its weights, under any engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardwright.train.checkpoint.format import layout
from tests.checkpoints import FILE_DAMAGES
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

NAMES = ("ddp", "zero2", "zero3", "fsdp")
RunOf = Callable[..., Path]


@pytest.fixture
def run_of(tiny_tree: TreeOf, frozen_run: Freeze) -> RunOf:
    """Return a function that freezes a run of 12 steps, evaluated and saved after every two."""

    def freeze(
        strategy: str, checkpoint: dict[str, Any], objective: str = "clm", **trainer: Any
    ) -> Path:
        tree = tiny_tree(objective)
        tree["strategy"] = STRATEGIES[strategy]
        cadence = {"max_steps": 12, "eval_every_steps": 2, "save_every_steps": 2}
        tree["trainer"] |= {**cadence, "lr_scheduler": "constant", **trainer}
        tree["checkpoint"] = checkpoint
        return frozen_run(tree)

    return freeze


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def losses_of(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in lines_of(run_dir) if "eval_loss" in line}


def steps_of(run_dir: Path) -> list[int]:
    return [step for step, _ in layout.whole_checkpoints(run_dir / "checkpoints")]


# --- early stopping -------------------------------------------------------------------------------

# No step improves the loss by as much as is asked for.
PATIENT = {"early_stopping_patience": 2, "early_stopping_threshold": 5.0}
STOPPED = "step 6/12  stopped early: eval_loss has not improved since step 2, in 2 evaluations\n"


@pytest.mark.parametrize("strategy", NAMES)
def test_all_ranks_stop_early_at_one_step_with_a_checkpoint(
    strategy: str, run_of: RunOf, ranks: RanksOf
) -> None:
    run_dir = run_of(strategy, {}, save_every_steps=4, **PATIENT)
    first, other = ranks(2)(whole_run, run_dir)
    assert STOPPED in first
    assert "stopped early" not in other
    assert steps_of(run_dir) == [4, 6]
    assert [line["step"] for line in lines_of(run_dir) if line.get("stopped_early")] == [6]
    assert max(line["step"] for line in lines_of(run_dir)) == 6
    assert (
        layout.read_manifest(run_dir / "checkpoints/checkpoint-6").metrics["eval_loss"]
        == (losses_of(run_dir)[6])
    )
    assert (run_dir / "final/model.safetensors").is_file()


def test_a_resumed_run_stops_where_an_uninterrupted_one_does(run_of: RunOf, ranks: RanksOf) -> None:
    run_dir = run_of("ddp", {}, **PATIENT)
    ranks(2)(whole_run, run_dir)
    expected = load_file(run_dir / "final/model.safetensors")

    # Killed after step 4: the evaluations before it count.
    for path in ("checkpoints/checkpoint-6", "final"):
        shutil.rmtree(run_dir / path)
    text = ranks(2)(whole_run, run_dir)[0]
    assert "resuming from checkpoint-4" in text
    assert STOPPED in text
    assert steps_of(run_dir) == [4, 6]
    assert torch.equal(
        load_file(run_dir / "final/model.safetensors")["transformer.wte.weight"],
        expected["transformer.wte.weight"],
    )

    # Killed between the stop and final/: nothing is trained beyond it.
    shutil.rmtree(run_dir / "final")
    text = ranks(2)(whole_run, run_dir)[0]
    assert "resuming from checkpoint-6" in text
    assert max(line["step"] for line in lines_of(run_dir)) == 6
    assert steps_of(run_dir) == [4, 6]
    found = load_file(run_dir / "final/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# --- the best -------------------------------------------------------------------------------------

# At such a rate the losses go up and down.
LAST = 6
RESTLESS: dict[str, Any] = {"learning_rate": 0.1, "max_steps": LAST}


@pytest.mark.parametrize("strategy", NAMES)
def test_final_gets_the_best_checkpoints_weights(
    strategy: str, run_of: RunOf, ranks: RanksOf
) -> None:
    rule = {"keep_last": 1, "keep_best": 1, "export": "best"}
    run_dir = run_of(strategy, rule, **RESTLESS)
    text = ranks(2)(whole_run, run_dir)[0]

    losses = losses_of(run_dir)
    best = min(losses, key=lambda step: losses[step])
    assert best < LAST, "or else nothing is tested"
    assert steps_of(run_dir) == [best, LAST]
    assert (
        f"final/ gets the weights of checkpoint-{best}, the best by eval_loss "
        f"({losses[best]:.4f})\n"
    ) in text
    card = (run_dir / "final/README.md").read_text()
    assert f"| loss | {losses[best]:.4f} |" in card
    assert f", {best} steps |" in card

    # A run that ends there ends with these weights.
    shorter = run_of(strategy, {}, **{**RESTLESS, "max_steps": best})
    ranks(2)(whole_run, shorter)
    found = load_file(run_dir / "final/model.safetensors")
    expected = load_file(shorter / "final/model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_best_by_accuracy_is_the_highest(run_of: RunOf, ranks: RanksOf) -> None:
    rule = {"keep_last": 1, "keep_best": 2, "best_metric": "eval_masked_accuracy"}
    run_dir = run_of("ddp", rule, "mlm", **RESTLESS)
    ranks(2)(whole_run, run_dir)
    name = "eval_masked_accuracy"
    measured = [(-line[name], line["step"]) for line in lines_of(run_dir) if name in line]
    best = [step for _, step in sorted(measured)[:2]]
    assert steps_of(run_dir) == sorted({*best, LAST})


def test_a_damaged_best_is_passed_over_and_said(run_of: RunOf, ranks: RanksOf) -> None:
    rule = {"keep_last": 9, "keep_best": 1, "export": "best"}
    run_dir = run_of("ddp", rule, **RESTLESS)
    ranks(2)(whole_run, run_dir)
    losses = losses_of(run_dir)
    best, second, *others = sorted(losses, key=lambda step: losses[step])
    checkpoints = run_dir / "checkpoints"

    def damage(step: int) -> None:
        path = checkpoints / f"checkpoint-{step}" / "rng-0.pt"
        FILE_DAMAGES["flip_last_bit"](path, path)

    def again() -> str:
        shutil.rmtree(run_dir / "final")
        return ranks(2)(whole_run, run_dir)[0]

    damage(best)
    text = again()
    assert f"checkpoint-{best} is not whole: rng-0.pt has the hash" in text
    assert f"final/ gets the weights of checkpoint-{second}" in text
    for step in (second, *others):
        if step != LAST:
            damage(step)
    manifest = checkpoints / f"checkpoint-{LAST}" / layout.MANIFEST
    tree = {**json.loads(manifest.read_text()), "metrics": {}}
    manifest.unlink()
    layout.write_manifest(manifest.parent, {k: v for k, v in tree.items() if "xxh3" not in k})
    text = again()
    assert (
        "warning: no checkpoint that was evaluated is whole; final/ gets the last weights" in text
    )
    assert (run_dir / "final/model.safetensors").is_file()
