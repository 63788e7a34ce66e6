"""A run with parts of the user's own: on ranks, with accumulation, and over a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.curves import curve
from tests.distributed.interrupted import SAVED, STEPS, STRATEGIES, interrupted
from tests.distributed.jobs import whole_run
from tests.distributed.optimizers import OPTIMIZERS, PARTS
from tests.distributed.pool import RanksFailed
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed


def test_a_loss_and_callbacks_and_an_optimizer_of_ones_own_over_a_resume(
    tiny_tree: TreeOf, frozen_run: Freeze, tmp_path: Path, ranks: RanksOf
) -> None:
    tree = tiny_tree("mlm")
    tree["strategy"] = STRATEGIES["zero2"]
    tree["objective"]["loss"] = f"{PARTS}:entropy"
    callbacks = [f"{PARTS}:Counting", f"{PARTS}:Exported"]
    own = {**OPTIMIZERS["custom"], "callbacks": callbacks}
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED, **own}
    tree["trainer"] |= {"eval_every_steps": 3}
    source = frozen_run(tree)
    ranks(2)(whole_run, source)
    assert curve(source, "eval_own_loss") == pytest.approx(curve(source, "eval_loss"), abs=1e-6)
    for rank in range(2):
        assert (source / f"counted-{rank}.txt").read_text() == str(STEPS)
    saved = json.loads((source / f"checkpoints/checkpoint-{SAVED}/callbacks.json").read_text())
    assert saved[callbacks[0]] == {"steps": SAVED}
    logs = saved[callbacks[1]]["attributes"]["logs"]
    assert logs >= SAVED

    resumed = interrupted(source, tmp_path / "resumed")
    for rank in range(2):
        (resumed / f"counted-{rank}.txt").unlink(missing_ok=True)
    ranks(2)(whole_run, resumed)
    assert curve(resumed) == curve(source)
    for rank in range(2):
        assert (resumed / f"counted-{rank}.txt").read_text() == str(STEPS)
    name = f"checkpoints/checkpoint-{STEPS}/callbacks.json"
    ended = [json.loads((run / name).read_text()) for run in (source, resumed)]
    assert ended[0] == ended[1]
    assert (resumed / "final/model.safetensors").read_bytes() == (
        source / "final/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_the_cross_entropy_as_a_loss_of_ones_own_is_the_projects(
    objective: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    """Two ranks, two micro-batches each, and samples that have not as many labels."""
    curves = []
    for loss in (None, f"{PARTS}:entropy"):
        tree = tiny_tree(objective)
        tree["objective"]["loss"] = loss
        run_dir = frozen_run(tree)
        ranks(2)(whole_run, run_dir)
        curves.append(curve(run_dir))
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


@pytest.mark.slow
def test_another_loss_is_minimised_alike_on_any_ranks(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    curves = []
    for strategy, count in (("single", 1), ("zero3", 2), ("fsdp", 2)):
        tree = tiny_tree("clm")
        tree["objective"]["loss"] = f"{PARTS}:focal"
        tree["strategy"] = STRATEGIES.get(strategy, {"kind": strategy})
        tree["launcher"]["nproc_per_node"] = count
        run_dir = frozen_run(tree)
        ranks(count)(whole_run, run_dir)
        curves.append(curve(run_dir))
        assert curve(run_dir, "eval_own_loss")[-1] < curve(run_dir, "eval_loss")[-1]
    assert curves[0][-1] < curves[0][0] - 0.1
    for found in curves[1:]:
        assert found == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.slow
def test_a_callback_that_fails_is_named_and_one_that_stops_ends_the_run(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["trainer"]["callbacks"] = [f"{PARTS}:Failing"]
    message = (
        r"trainer.callbacks=.*example_parts.py:Failing failed in on_step_end at step 2: "
        r"ValueError: no such luck \(.*example_parts.py, line \d+\)"
    )
    with pytest.raises(RanksFailed, match=message):
        ranks(2)(whole_run, frozen_run(tree))

    tree["trainer"]["callbacks"] = [f"{PARTS}:StopsAtTwo"]
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    assert len(curve(run_dir)) == 2
    assert (run_dir / "checkpoints/checkpoint-2/manifest.json").is_file()
    assert (run_dir / "final/model.safetensors").is_file()
