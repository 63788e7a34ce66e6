"""Damage to any file that an engine wrote is found, and training goes on from before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.train.checkpoint.discovery import newest_whole
from shardwright.train.checkpoint.format import layout
from tests.checkpoints import FILE_DAMAGES
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

NAMES = ("ddp", "zero2", "zero3", "fsdp")


@pytest.fixture
def run_of(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> Callable[[str], Path]:
    """Return a function that trains four steps with a checkpoint after every two."""

    def run(strategy: str) -> Path:
        tree = tiny_tree("clm")
        tree["strategy"] = STRATEGIES[strategy]
        tree["trainer"] |= {"max_steps": 4, "save_every_steps": 2}
        run_dir = frozen_run(tree)
        ranks(2)(whole_run, run_dir)
        return run_dir

    return run


@pytest.mark.parametrize("strategy", NAMES)
def test_any_damage_to_any_file_is_found(
    strategy: str, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoints = run_of(strategy) / "checkpoints"
    older, newest = (path for _, path in layout.whole_checkpoints(checkpoints))
    assert newest_whole(checkpoints) == (newest, [])
    copy = tmp_path / newest.name
    shutil.copytree(newest, copy)
    names = [path.relative_to(newest) for path in layout.files_of(newest)]
    for name in [*names, Path(layout.MANIFEST)]:
        same_at_both_steps = (older / name).read_bytes() == (newest / name).read_bytes()
        for damage, act in FILE_DAMAGES.items():
            if damage == "swap" and same_at_both_steps:
                continue
            act(newest / name, older / name)
            chosen, passed_over = newest_whole(checkpoints)
            assert chosen == older, f"{damage} of {name} is not noticed"
            assert [p.step for p in passed_over] == [4]
            shutil.rmtree(newest)
            shutil.copytree(copy, newest)
    assert newest_whole(checkpoints) == (newest, [])


def test_a_run_goes_on_from_the_checkpoint_before_and_says_so(
    run_of: Callable[[str], Path], ranks: RanksOf
) -> None:
    run_dir = run_of("fsdp")
    shutil.rmtree(run_dir / "final")
    newest, older = (run_dir / "checkpoints" / f"checkpoint-{step}" for step in (4, 2))
    (shard,) = newest.glob("engine/__1_*.distcp")
    FILE_DAMAGES["flip_last_bit"](shard, shard)
    text = ranks(2)(whole_run, run_dir)[0]
    assert f"checkpoint-4 is not whole: engine/{shard.name} has the hash" in text
    assert "resuming from checkpoint-2\n" in text
    # It has been written anew in the place of the damaged one.
    assert layout.verify(newest) == layout.verify(older) == []
    assert sorted(p.name for p in newest.parent.iterdir()) == ["checkpoint-2", "checkpoint-4"]
