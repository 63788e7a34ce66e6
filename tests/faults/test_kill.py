"""A run that is killed, at any moment, goes on by the same command and ends with the same bits.

The default suite has six of the kills; `make test-faults` has all of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.checkpoint.format import layout
from tests.e2e.cli import finish, processes, rank_process, start_python, wait_for
from tests.faults.killable import WORLD_SIZE, AtEvent, AtTime, Kill, events, start
from tests.fixtures import TreeOf
from tests.logged import metrics
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

NAMES = ("ddp", "zero2", "zero3_many_groups", "fsdp")
OFFLOADED = ("zero2_offload", "zero3_offload", "fsdp_offload")
MAX_STEPS = 4  # with a checkpoint after each; the first goes when the third is there

MOMENTS: dict[str, AtEvent] = {
    "in the first step": AtEvent("train.micro_batch", 1),
    "in the third step": AtEvent("train.micro_batch", 5, rank=1),
    "before a line of metrics": AtEvent("open metrics.jsonl", 2),
    "as a save begins": AtEvent(r"os.mkdir checkpoints/.checkpoint-2.tmp$"),
    "within the files of rank 0": AtEvent(r"open checkpoints/.checkpoint-3.tmp/", 2),
    "within the files of rank 1": AtEvent(r"open checkpoints/.checkpoint-2.tmp/", 1, rank=1),
    "before the manifest": AtEvent(r"open checkpoints/.checkpoint-2.tmp/manifest.json"),
    "before the first rename": AtEvent(r"os.rename checkpoints/.checkpoint-1.tmp$"),
    "before a later rename": AtEvent(r"os.rename checkpoints/.checkpoint-3.tmp$"),
    # Of the last save, so that no later one deletes what this one had to.
    "between rename and retention": AtEvent(r"open checkpoints$", MAX_STEPS - 1),
    "as retention begins": AtEvent(r"os.remove checkpoints/checkpoint-1/manifest.json"),
    "within retention": AtEvent(r"os.remove checkpoints/checkpoint-1/", 3),
    "as the export begins": AtEvent(r"os.mkdir .final.tmp$"),
    "within the export": AtEvent(r"open .final.tmp/", 3),
    "before the rename of the export": AtEvent(r"os.rename .final.tmp$"),
    "after the rename of the export": AtEvent(r"open \.$"),
}
IN_THE_DEFAULT_SUITE = {
    ("ddp", "before a later rename"),
    ("zero2", "within the files of rank 1"),
    ("zero2", "before the rename of the export"),
    ("zero3_many_groups", "in the third step"),
    ("fsdp", "between rename and retention"),
    ("fsdp", "within retention"),
}


def named_kills() -> list[Any]:
    """Return a case for each strategy and moment; every other one kills all ranks at once."""
    cases = []
    for i, strategy in enumerate(NAMES):
        for j, (moment, kill) in enumerate(MOMENTS.items()):
            everyone = (i + j) % 2 == 1
            kill = AtEvent(kill.pattern, kill.occurrence, kill.rank, everyone)
            marks = () if (strategy, moment) in IN_THE_DEFAULT_SUITE else pytest.mark.faults
            name = f"{strategy}-{moment}-{'all' if everyone else f'rank {kill.rank}'}"
            cases.append(pytest.param(strategy, kill, id=name.replace(" ", "_"), marks=marks))
    return cases


def trained(strategy: str, run_dir: Path, tree: dict[str, Any], **checkpoint: Any) -> Path:
    """Freeze the config of a run into a directory."""
    # Odd sizes, so that partitions need padding; dropout, so that the dice matter.
    tree["model"] |= {"vocab_size": 389, "intermediate_size": 67, "dropout": 0.1}
    tree["strategy"] = STRATEGIES[strategy]
    tree["checkpoint"] = checkpoint
    # The last step is evaluated beside the cadence too.
    tree["trainer"] |= {"max_steps": MAX_STEPS, "save_every_steps": 1, "eval_every_steps": 3}
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(json.dumps(tree))
    return run_dir


@pytest.fixture(scope="session")
def uninterrupted_runs() -> dict[str, Path]:
    return {}


@pytest.fixture
def uninterrupted(
    tiny_tree: TreeOf,
    tmp_path_factory: pytest.TempPathFactory,
    uninterrupted_runs: dict[str, Path],
) -> Callable[[str], Path]:
    """Return a function that gives a strategy's run that nothing happened to."""

    def run(strategy: str) -> Path:
        if strategy not in uninterrupted_runs:
            run_dir = tmp_path_factory.mktemp(strategy) / "uninterrupted"
            trained(strategy, run_dir, tiny_tree("clm"))
            ended = start(run_dir)
            assert ended.exit_codes == [0] * WORLD_SIZE, ended
            uninterrupted_runs[strategy] = run_dir
        return uninterrupted_runs[strategy]

    return run


@pytest.fixture
def fresh(tiny_tree: TreeOf, tmp_path: Path) -> Callable[..., Path]:
    """Return a function from a strategy to a run of it that has not begun."""
    return lambda strategy, **checkpoint: trained(
        strategy, tmp_path / "run", tiny_tree("clm"), **checkpoint
    )


def kill_and_go_on(run_dir: Path, kills: list[Kill]) -> None:
    """Start a run again after each kill, until it ends by itself."""
    for kill in [*kills, None]:
        found = [path.name for path in checkpoints(run_dir)]
        ended = start(run_dir, kill)
        assert "skipped" not in ended.console, "a checkpoint that has its name is not whole"
        if kill is not None:
            assert -signal.SIGKILL in ended.exit_codes, f"{kill} did not come: {ended}"
        else:
            assert ended.exit_codes == [0] * WORLD_SIZE, ended
            assert not found or f"resuming from {found[-1]}\n" in ended.console
        whole = [path for path in checkpoints(run_dir) if layout.what_is_wrong(path) is None]
        assert whole[-1:] == checkpoints(run_dir)[-1:], "the newest one is not whole"


def checkpoints(run_dir: Path) -> list[Path]:
    """Return all that is named as a checkpoint, oldest first."""
    return sorted(run_dir.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name[11:]))


def assert_ended_alike(run_dir: Path, uninterrupted: Path) -> None:
    weights = "final/model.safetensors"
    assert (run_dir / weights).read_bytes() == (uninterrupted / weights).read_bytes()
    assert metrics(run_dir) == metrics(uninterrupted)
    # Each further start leaves its provenance.
    assert [n for n in names(run_dir, "*") if n != "resumes"] == names(uninterrupted, "*")
    assert names(run_dir / "final", "*") == names(uninterrupted / "final", "*")
    assert not any(layout.what_is_wrong(path) for path in (run_dir / "checkpoints").iterdir())
    assert names(run_dir / "checkpoints", "**/*") == names(uninterrupted / "checkpoints", "**/*")


def names(directory: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.glob(pattern))


@pytest.mark.wide
@pytest.mark.parametrize(("strategy", "kill"), named_kills())
def test_a_run_killed_at_the_worst_moments_ends_with_the_same_bits(
    strategy: str,
    kill: Kill,
    fresh: Callable[[str], Path],
    uninterrupted: Callable[[str], Path],
) -> None:
    run_dir = fresh(strategy)
    kill_and_go_on(run_dir, [kill])
    assert_ended_alike(run_dir, uninterrupted(strategy))


@pytest.mark.faults
@pytest.mark.parametrize(
    "moment", ["in the third step", "within the files of rank 1", "between rename and retention"]
)
@pytest.mark.parametrize("strategy", OFFLOADED)
def test_an_offloaded_run_that_is_killed_ends_with_the_same_bits(
    strategy: str,
    moment: str,
    fresh: Callable[[str], Path],
    uninterrupted: Callable[[str], Path],
) -> None:
    run_dir = fresh(strategy)
    kill_and_go_on(run_dir, [MOMENTS[moment]])
    assert_ended_alike(run_dir, uninterrupted(strategy))


@pytest.mark.faults
@pytest.mark.parametrize(
    "moment",
    [
        "as a save begins",
        "within the files of rank 0",
        "within the files of rank 1",
        "before the manifest",
        "before a later rename",
        "between rename and retention",
        "within retention",
    ],
)
@pytest.mark.parametrize("strategy", NAMES)
def test_a_run_killed_while_it_saves_in_the_background_ends_with_the_same_bits(
    strategy: str,
    moment: str,
    fresh: Callable[..., Path],
    uninterrupted: Callable[[str], Path],
) -> None:
    """Those that nothing happened to save in the foreground: what is written is the same."""
    run_dir = fresh(strategy, **{"async": True})
    kill_and_go_on(run_dir, [MOMENTS[moment]])
    assert_ended_alike(run_dir, uninterrupted(strategy))


@pytest.mark.faults
@pytest.mark.parametrize("strategy", NAMES)
def test_a_run_killed_in_a_step_beside_a_save_ends_with_the_same_bits(
    strategy: str,
    fresh: Callable[..., Path],
    uninterrupted: Callable[[str], Path],
) -> None:
    run_dir = fresh(strategy, **{"async": True})
    in_the_third_step = AtEvent("train.micro_batch", 5, everyone=True, seconds_per_file=0.3)
    start(run_dir, in_the_third_step)
    assert (run_dir / "checkpoints/.checkpoint-2.tmp").is_dir(), "it was not in flight"
    assert layout.what_is_wrong(run_dir / "checkpoints/checkpoint-1") is None
    kill_and_go_on(run_dir, [])
    assert_ended_alike(run_dir, uninterrupted(strategy))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strategy", NAMES)
def test_a_run_killed_three_times_at_random_ends_with_the_same_bits(
    strategy: str,
    seed: int,
    fresh: Callable[[str], Path],
    uninterrupted: Callable[[str], Path],
) -> None:
    draw = random.Random(f"{strategy} {seed}")
    rank = draw.randrange(WORLD_SIZE)
    moments = len(events(uninterrupted(strategy), rank))
    run_dir = fresh(strategy)
    kill_and_go_on(
        run_dir,
        [
            # Any event of the run but its last ones, as a rank that finds the tokenizer copied has
            # a few less; then one of the many that every start has.
            AtEvent("", draw.randrange(moments * 3 // 4), rank, everyone=draw.random() < 0.5),
            AtEvent("", draw.randrange(20), 0, everyone=draw.random() < 0.5),
            AtEvent("", draw.randrange(20), 0, everyone=draw.random() < 0.5),
        ],
    )
    assert_ended_alike(run_dir, uninterrupted(strategy))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strategy", NAMES)
def test_a_run_killed_by_the_clock_ends_with_the_same_bits(
    strategy: str,
    seed: int,
    fresh: Callable[[str], Path],
    uninterrupted: Callable[[str], Path],
) -> None:
    draw = random.Random(f"{strategy} {seed} by the clock")
    kill = AtTime(
        step=draw.randrange(1, MAX_STEPS),
        seconds=draw.uniform(0, 0.2),
        rank=draw.randrange(WORLD_SIZE),
        everyone=draw.random() < 0.5,
    )
    run_dir = fresh(strategy)
    kill_and_go_on(run_dir, [kill])
    assert_ended_alike(run_dir, uninterrupted(strategy))


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["zero3_many_groups", "fsdp"])
def test_a_run_of_torchrun_killed_from_outside_ends_with_the_same_bits(
    strategy: str,
    fresh: Callable[[str], Path],
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run_dir = fresh(strategy)
    command = (
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={WORLD_SIZE}",
        "-m",
        "shardwright.train",
    )
    killed = start_python(*command, str(run_dir), cwd=tmp_path)
    wait_for(run_dir / "checkpoints/checkpoint-2", killed)
    os.kill(rank_process(tmp_path, 1), signal.SIGKILL)
    assert finish(killed).returncode != 0
    assert not list(processes(tmp_path)), "ranks outlive torchrun"
    ended = finish(start_python(*command, str(run_dir), cwd=tmp_path))
    assert ended.returncode == 0, ended
    assert "resuming from checkpoint-" in ended.stdout
    assert_ended_alike(run_dir, uninterrupted(strategy))
