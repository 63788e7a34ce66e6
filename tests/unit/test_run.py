"""How long a run is, and what of it is refused before it begins."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.train.config import from_tree, load, samples_wanted, total_steps
from shardwright.train.errors import UserError
from shardwright.train.process.rank import Rank
from shardwright.train.run import assemble, nothing_left
from tests.fixtures import Freeze, TreeOf

Tree = TreeOf


@pytest.mark.parametrize(
    ("length", "samples_per_epoch", "steps"),
    [
        ({"max_steps": 7}, 3, 7),
        ({"max_epochs": 1}, 160, 10),
        ({"max_epochs": 1}, 161, 11),
        ({"max_epochs": 2.5}, 160, 25),
        ({"max_epochs": 0.01}, 160, 1),
        ({"max_epochs": 1.1}, 160, 11),  # 1.1 * 160 is 176.00000000000003
        ({"max_tokens": 16 * 32 * 3}, 160, 3),
        ({"max_tokens": 16 * 32 * 3 + 1}, 160, 4),
        ({"max_tokens": 1}, 160, 1),
        ({"max_tokens": 10**13}, 160, 19_531_250_000),
    ],
)
def test_steps_follow_from_steps_epochs_or_tokens(
    length: dict[str, float], samples_per_epoch: int, steps: int, tiny_tree: Tree
) -> None:
    tree = tiny_tree("clm")
    del tree["trainer"]["max_steps"]
    tree["trainer"] |= {"global_batch_size": 16, **length}
    assert tree["data"]["sequence_length"] == 32
    config = from_tree(tree)
    assert total_steps(config.trainer, samples_wanted(config, samples_per_epoch)) == steps


@pytest.mark.parametrize("limit", ["max_steps", "max_epochs", "max_tokens"])
def test_a_resume_that_makes_no_step_says_so(limit: str, tiny_tree: Tree) -> None:
    tree = tiny_tree("clm")
    tree["trainer"] |= {"max_steps": None, limit: 4}
    trainer = from_tree(tree).trainer
    assert nothing_left(trainer, 3, 4) is None
    said = f"all 4 steps are trained already; raise trainer.{limit} to train further"
    assert nothing_left(trainer, 4, 4) == said


def test_prompts_that_cannot_be_answered_are_refused_before_the_training(
    tiny_tree: Tree, frozen_run: Freeze
) -> None:
    tree = tiny_tree("mlm")
    tree["objective"]["prompts"] = ["import <mask>", "def <mask>(<mask>):"]
    alone = Rank(index=0, local_index=0, world_size=1)
    run_dir = frozen_run(tree)
    config = load(run_dir)
    with pytest.raises(UserError, match="'def <mask>.*' has 2 masks; this model fills exactly one"):
        assemble(run_dir, config, alone, io.StringIO())


def test_a_rank_reads_and_validates_its_config_once(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    tmp_path: Path,
) -> None:
    tree = tiny_tree("mlm")
    tree["launcher"]["nproc_per_node"] = 1
    tree["objective"]["prompts"] = ["no mask"]  # refused once data and tokenizer are there
    run_dir = frozen_run(tree)
    seen = tmp_path / "seen"
    program = f"""
import sys
from pathlib import Path
from shardwright.train import __main__
from shardwright.train.config import run

sound = run.contradictions

def counted(config):
    with Path({str(seen)!r}).open("a") as file:
        file.write("validated ")
    return sound(config)

run.contradictions = counted
sys.exit(__main__.main([{str(run_dir)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "'no mask' has 0 masks" in done.stdout + done.stderr
    assert seen.read_text() == "validated "


def test_a_rank_imports_no_library_of_another_strategy_or_source(
    tiny_tree: TreeOf, frozen_run: Freeze
) -> None:
    tree = tiny_tree("mlm")
    tree["strategy"] = {"kind": "single"}
    tree["launcher"]["nproc_per_node"] = 1
    tree["trainer"] |= {"max_steps": 1, "global_batch_size": 4, "eval_max_samples": 4}
    program = f"""
import sys
from shardwright.train import __main__
code = __main__.main([{str(frozen_run(tree))!r}])
heavy = {{"datasets", "deepspeed", "pandas", "pyarrow"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
