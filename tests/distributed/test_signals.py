"""Told to stop at any moment, all ranks stop at one step, and the run goes on with the same bits.

The default suite has a few of the moments; `make test-faults` has all of them. What launchers make
of a signal is in tests/e2e/test_signals.py.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

from shardwright.train.checkpoint.format import layout
from shardwright.train.run_directory import stop_note
from tests.faults.killable import WORLD_SIZE, AtEvent, start
from tests.fixtures import TreeOf
from tests.logged import metrics

pytestmark = pytest.mark.distributed

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero2": {"kind": "zero", "stage": 2},
    "zero3": {"kind": "zero", "stage": 3, "sub_group_elements": 3000},
    "fsdp": {"kind": "fsdp"},
}
MAX_STEPS = 5  # checkpoints of steps 2 and 4, which are evaluated; lines of loss for them too
BATCHES = 7  # of one evaluation

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1

# When the signal comes, and where the run then stops.
MOMENTS: dict[str, tuple[AtEvent, int]] = {
    "in the first step, of rank 1": (AtEvent("train.micro_batch", 1, rank=1, signal=TERM), 1),
    "in the third step, of rank 1": (AtEvent("train.micro_batch", 4, rank=1, signal=TERM), 3),
    "in the third step, of all": (AtEvent("train.micro_batch", 4, everyone=True, signal=USR1), 3),
    "in the last step, of rank 0": (AtEvent("train.micro_batch", 8, signal=USR1), 5),
    "in a save, all twice": (
        AtEvent("open checkpoints/.checkpoint-2.tmp/", 1, everyone=True, signal=TERM, times=2),
        2,
    ),
    "in an evaluation, of rank 0": (AtEvent("train.evaluation_batch", BATCHES + 1, signal=USR1), 4),
    "in an evaluation, all twice": (
        AtEvent("train.evaluation_batch", BATCHES + 1, everyone=True, signal=TERM, times=2),
        4,
    ),
    "in the last evaluation, of rank 1": (
        AtEvent("train.evaluation_batch", 2 * BATCHES + 1, rank=1, signal=TERM),
        5,
    ),
    "in the export, of rank 0": (AtEvent("os.mkdir .final.tmp$", signal=TERM), 5),
    "in the export, of rank 1 as it writes": (
        AtEvent("open .final.tmp/", rank=1, signal=TERM),
        5,
    ),
    "in the export, all twice": (
        AtEvent("os.mkdir .final.tmp$", everyone=True, signal=USR1, times=2),
        5,
    ),
}
IN_THE_DEFAULT_SUITE = {
    ("ddp", "in the third step, of rank 1"),
    ("ddp", "in an evaluation, of rank 0"),
    ("ddp", "in the export, of rank 0"),
    ("ddp", "in the last step, of rank 0"),
    ("zero2", "in a save, all twice"),
}


def cases() -> list[Any]:
    return [
        pytest.param(
            strategy,
            *found,
            id=f"{strategy}-{moment}".replace(" ", "_").replace(",", ""),
            marks=() if (strategy, moment) in IN_THE_DEFAULT_SUITE else pytest.mark.faults,
        )
        for strategy in STRATEGIES
        for moment, found in MOMENTS.items()
    ]


def frozen(run_dir: Path, strategy: str, tree: dict[str, Any]) -> Path:
    """Write a config to a run directory that has not begun."""
    # Dropout, so that the dice matter; two steps to a logged loss, of which a stop may take one.
    tree["model"] |= {"vocab_size": 389, "intermediate_size": 67, "dropout": 0.1}
    tree["strategy"] = STRATEGIES[strategy]
    tree["trainer"] |= {
        "max_steps": MAX_STEPS,
        "log_every_steps": 2,
        "save_every_steps": 2,
        "eval_every_steps": 2,
        "eval_micro_batch_size": 1,
    }
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(json.dumps(tree))
    return run_dir


@pytest.fixture(scope="session")
def undisturbed_runs() -> dict[str, Path]:
    return {}


@pytest.fixture
def undisturbed(
    tiny_tree: TreeOf,
    tmp_path_factory: pytest.TempPathFactory,
    undisturbed_runs: dict[str, Path],
) -> Callable[[str], Path]:
    """Return a function that gives a strategy's run that nothing happened to."""

    def run(strategy: str) -> Path:
        if strategy not in undisturbed_runs:
            run_dir = tmp_path_factory.mktemp(strategy) / "undisturbed"
            ended = start(frozen(run_dir, strategy, tiny_tree("clm")))
            assert ended.exit_codes == [0] * WORLD_SIZE, ended
            undisturbed_runs[strategy] = run_dir
        return undisturbed_runs[strategy]

    return run


def stopped(run_dir: Path, when: AtEvent) -> stop_note.Stopped:
    """Start a run, signal it, and return where it has stopped, with all that it has whole."""
    ended = start(run_dir, when)
    assert ended.exit_codes == [75] * WORLD_SIZE, ended
    assert "failed" not in ended.console
    assert not list(run_dir.glob("logs/*.error.json"))
    assert not (run_dir / "final").exists()
    directory = run_dir / "checkpoints"
    assert not any(layout.what_is_wrong(path) for path in directory.glob("checkpoint-*"))
    assert not list(directory.glob(".*.tmp"))
    assert not list(run_dir.glob(".tokenizer-*"))
    where = stop_note.read(run_dir)
    assert where is not None
    return where


def assert_goes_on_to_the_same_end(run_dir: Path, undisturbed: Path) -> None:
    ended = start(run_dir)
    assert ended.exit_codes == [0] * WORLD_SIZE, ended
    assert not (run_dir / stop_note.NOTE).exists()
    weights = "final/model.safetensors"
    assert (run_dir / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert metrics(run_dir) == metrics(undisturbed)
    # What was evaluated at a checkpoint's step stands in its manifest, cut or not.
    for step, checkpoint in layout.whole_checkpoints(undisturbed / "checkpoints"):
        mine = run_dir / "checkpoints" / checkpoint.name
        assert mine.is_dir() or step != MAX_STEPS
        if mine.is_dir():
            assert layout.read_manifest(mine).metrics == layout.read_manifest(checkpoint).metrics


@pytest.mark.parametrize(("strategy", "when", "step"), cases())
def test_all_ranks_stop_at_one_step_and_go_on_with_the_same_bits(
    strategy: str,
    when: AtEvent,
    step: int,
    tiny_tree: TreeOf,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run_dir = frozen(tmp_path / "run", strategy, tiny_tree("clm"))
    where = stopped(run_dir, when)
    assert (where.step, where.samples, where.progress_steps) == (step, 16 * step, step)
    assert where.checkpoint == str(run_dir / f"checkpoints/checkpoint-{step}")
    ranks = "ranks 0, 1" if when.everyone else f"rank {when.rank}"
    assert where.reason == f"{signal.Signals(when.signal).name} on {ranks}"
    assert where.unsaved is None
    assert_goes_on_to_the_same_end(run_dir, undisturbed(strategy))


def test_a_save_that_does_not_fit_into_the_grace_period_is_not_begun(
    tiny_tree: TreeOf,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tree = tiny_tree("clm")
    tree["launcher"]["grace_seconds"] = 0.001
    run_dir = frozen(tmp_path / "run", "ddp", tree)
    where = stopped(run_dir, AtEvent("train.micro_batch", 4, signal=TERM))
    assert (where.step, where.checkpoint) == (3, str(run_dir / "checkpoints/checkpoint-2"))
    assert where.unsaved is not None
    assert where.unsaved.endswith(
        "0.0 s were left of launcher.grace_seconds=0.001; raise it to keep the last steps"
    )
    assert_goes_on_to_the_same_end(run_dir, undisturbed("ddp"))


@pytest.mark.faults
def test_a_save_in_the_background_is_waited_for(
    tiny_tree: TreeOf,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tree = tiny_tree("clm")
    tree["checkpoint"] = {"async": True}
    run_dir = frozen(tmp_path / "run", "ddp", tree)
    where = stopped(run_dir, AtEvent("open checkpoints/.checkpoint-2.tmp/", signal=TERM))
    # Training has gone on meanwhile, for as long as it took.
    assert where.step >= 2
    assert where.checkpoint == str(run_dir / f"checkpoints/checkpoint-{where.step}")
    assert_goes_on_to_the_same_end(run_dir, undisturbed("ddp"))


@pytest.mark.faults
def test_workers_that_load_the_data_outlive_the_signal(
    tiny_tree: TreeOf,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tree = tiny_tree("clm")
    tree["trainer"]["dataloader_workers"] = 2
    run_dir = frozen(tmp_path / "run", "ddp", tree)
    # The whole process group has it, of which the workers are.
    where = stopped(run_dir, AtEvent("train.micro_batch", 4, everyone=True, signal=TERM, times=2))
    assert where.step == 3
    assert_goes_on_to_the_same_end(run_dir, undisturbed("ddp"))


@pytest.mark.faults
@pytest.mark.parametrize("everyone", [False, True])
def test_ranks_that_prepare_their_data_begin_anew(
    everyone: bool,
    tiny_tree: TreeOf,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tree, reference = tiny_tree("clm"), undisturbed("ddp")
    own_cache = tmp_path / "cache"
    shutil.copytree(Path(tree["data"]["cache_dir"]) / "tokenizers", own_cache / "tokenizers")
    tree["data"]["cache_dir"] = str(own_cache)
    run_dir = frozen(tmp_path / "run", "ddp", tree)
    # Whoever is not told waits for tokens that another process seems to pack.
    name = json.loads((reference / "data.json").read_text())["tokens"]
    (own_cache / "tokens").mkdir()
    with filelock.FileLock(own_cache / "tokens" / f"{name}.lock"):
        where = stopped(run_dir, AtEvent("os.mkdir .tokenizer-", everyone=everyone, signal=TERM))
    assert (where.step, where.checkpoint, where.progress_steps) == (0, None, 0)
    assert where.reason == f"SIGTERM on {'ranks 0, 1' if everyone else 'rank 0'}"
    assert not (run_dir / "checkpoints").exists()
    assert_goes_on_to_the_same_end(run_dir, reference)
