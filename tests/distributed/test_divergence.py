"""A run that has diverged stops and says so, instead of training on NaN."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import whole_run
from tests.distributed.pool import RanksFailed

pytestmark = pytest.mark.distributed


def test_a_loss_that_is_no_number_stops_the_run(
    tiny_tree: Callable[[str], dict[str, Any]],
    frozen_run: Callable[[dict[str, Any]], Path],
    ranks: Callable[[int], Any],
) -> None:
    tree = tiny_tree("clm")
    tree["trainer"] |= {"learning_rate": 1e30, "adam_epsilon": 1e-30}
    run_dir = frozen_run(tree)
    with pytest.raises(RanksFailed, match=r"the loss is (nan|inf) at step \d+: training has div"):
        ranks(2)(whole_run, run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] is None
    assert len(lines) < 20
    assert not (run_dir / "final").exists()
