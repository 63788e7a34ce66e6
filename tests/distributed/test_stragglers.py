"""Ranks that hold others up, and data that come late, named by a run of real gloo ranks."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from shardwright.train.charts.panels import OF_RANKS
from shardwright.train.data.batches.samples import Mixture
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process import collectives, heartbeat
from shardwright.train.process.rank import rank_from_environment
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed

EVEN_FROM, STARVES_FROM, STEPS = 8, 10, 18
FORWARD_SECONDS, SAMPLE_SECONDS = 0.3, 0.1
"""Longer than all else that a step takes."""


def slowed_run(run_dir: Path) -> str:
    """Train with rank 1 slow at first, and with slow data for all at last; return what is told."""
    rank = rank_from_environment()
    compute, get = Trainer.compute_loss, Mixture.get
    at = 0

    def slow_compute(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
        nonlocal at
        at = trainer.state.global_step + 1
        if rank.index == 1 and at < EVEN_FROM:
            time.sleep(FORWARD_SECONDS)
        return compute(trainer, *arguments, **options)

    def slow_get(*arguments: Any) -> Any:
        if at >= STARVES_FROM:
            time.sleep(SAMPLE_SECONDS)
        return get(*arguments)

    with (
        heartbeat.beating(run_dir, rank, collectives.recorded),
        mock.patch.object(Trainer, "compute_loss", slow_compute),
        mock.patch.object(Mixture, "get", slow_get),
    ):
        return whole_run(run_dir)


def test_a_slow_rank_and_slow_data_are_named(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["data"]["eval_fraction"] = 0
    # Each has two micro-batches of two samples a step.
    tree["trainer"] |= {"max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2}
    run_dir = frozen_run(tree)
    told, other = ranks(2)(slowed_run, run_dir)
    warnings = [line for line in told.splitlines() if line.startswith("warning: ")]
    (slow,) = (line for line in warnings if " is slow: " in line)
    host = re.escape(socket.gethostname())
    assert re.match(
        rf"warning: rank 1 on node {host} is slow: of each step [\d,]+ ms go into computing, "
        r"\d+ ms on the others, which wait for it; 3 logs in a row$",
        slow,
    )
    (starved,) = (line for line in warnings if "waits for data" in line)
    assert re.match(r"warning: training waits for data, \d+% of each step \(\d+ ms of \d+", starved)
    assert warnings.index(slow) < warnings.index(starved)
    assert "warning: " not in other

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines if f"compute{OF_RANKS}" in line}
    assert by_step[6]["compute_most_rank"] == 1
    assert by_step[6]["wait_most_rank"] == 0
    assert by_step[6]["compute_seconds/max"] >= 2 * FORWARD_SECONDS
    assert by_step[STEPS]["data_seconds/min"] >= 4 * SAMPLE_SECONDS
