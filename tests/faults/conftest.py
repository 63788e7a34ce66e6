"""Real checkpoints of two ranks, for tests to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.jobs import whole_run
from tests.fixtures import RanksOf, TreeOf
from tests.strategies import STRATEGIES


@pytest.fixture(scope="session")
def saved_runs() -> dict[str, Path]:
    return {}


@pytest.fixture
def run_of(
    tiny_tree: TreeOf,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    ranks: RanksOf,
    saved_runs: dict[str, Path],
) -> Callable[[str], Path]:
    """Return a function that gives a copy of a strategy's run, with checkpoints of steps 1 and 2.

    It has no final/ yet, as if it had been killed.
    """

    def run(strategy: str) -> Path:
        if strategy not in saved_runs:
            run_dir = tmp_path_factory.mktemp(strategy) / "run"
            run_dir.mkdir()
            tree = tiny_tree("clm")
            tree["strategy"] = STRATEGIES[strategy]
            tree["trainer"] |= {"max_steps": 2, "save_every_steps": 1, "eval_max_samples": 4}
            (run_dir / "config.yaml").write_text(json.dumps(tree))
            ranks(2)(whole_run, run_dir)
            shutil.rmtree(run_dir / "final")
            saved_runs[strategy] = run_dir
        return Path(shutil.copytree(saved_runs[strategy], tmp_path / strategy))

    return run
