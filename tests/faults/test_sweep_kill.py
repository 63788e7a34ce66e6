"""A sweep that is killed as a whole, twice, at random moments, ends as one left alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.launchers.sweep import directory
from tests.e2e import cli, sweeps
from tests.e2e.conftest import tiny

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]
__all__ = ["tiny"]
SEED = 20260131
POINTS = 8


def test_killed_twice_it_trains_each_point_once_to_the_same_losses(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    words = [
        *sweeps.words(tiny("clm")),
        *("trainer.learning_rate=1e-4,1e-3,3e-3,1e-2", "sweep.seeds=2", "sweep.max_parallel=2"),
    ]
    alone = cli.shardwright("sweep", *words, "sweep_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stdout + alone.stderr

    sweep_dir, draws = tmp_path / "killed", random.Random(SEED)
    named = [*words, f"sweep_dir={sweep_dir}"]
    all_steps = POINTS * sweeps.STEPS
    cuts = 0
    for first, last in ((1, all_steps // 2), (all_steps // 2, all_steps - 8)):
        steps, seconds = draws.randint(first, last), draws.uniform(0, 3)
        sweeps.cut(named, tmp_path, lambda n=steps: sweeps.progress(sweep_dir) >= n, seconds)  # type: ignore[misc]
        states = directory.states(directory.read(sweep_dir))
        running = [state.number for state in states if state.state == "running"]
        cuts += len(running)
        print(f"killed {seconds:.2f} s after step {steps} of {all_steps}, points {running} ran")
    ended = cli.shardwright("sweep", *named, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    assert sweeps.losses(sweep_dir) == sweeps.losses(tmp_path / "alone")
    states = directory.states(directory.read(sweep_dir))
    assert [(state.state, state.failures) for state in states] == [("done", 0)] * POINTS
    # A point that a kill found as it ended is seen to be done, and not begun again.
    attempts = sum(state.attempts for state in states)
    assert POINTS < attempts <= POINTS + cuts
    print(f"{attempts} starts of {POINTS} points, {cuts} of them cut")
    for number in range(POINTS):
        assert sweeps.steps(sweep_dir / str(number)) == list(range(1, sweeps.STEPS + 1))
