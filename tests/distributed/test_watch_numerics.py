"""The first module that fails is found under every engine, while it trains and by a replay."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.diagnosing import replay
from shardwright.train.run_directory import replays
from tests.distributed.curves import curve
from tests.distributed.jobs import whole_run
from tests.distributed.planted import (
    MODULE,
    replayed_with_a_planted_nan,
    trained_with_a_planted_nan,
)
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
SPOILT = 3


def tree_of(tree: dict[str, Any], engine: str, **debug: Any) -> dict[str, Any]:
    tree["strategy"] = STRATEGIES[engine]
    tree["data"]["eval_fraction"] = 0.0
    tree["trainer"] |= {"max_steps": 5, "save_every_steps": 2, "debug": debug}
    return tree


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_planted_nan_is_found_where_it_is(
    engine: str,
    direction: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    run_dir = frozen_run(tree_of(tiny_tree("clm"), engine, numerics="watch"))
    found = ranks(2)(trained_with_a_planted_nan, run_dir, MODULE, direction, SPOILT, 1, 2)
    for each in found:
        assert each["step"] == SPOILT
        assert (
            f"first in the {direction} pass of {MODULE} (GPT2MLP), on rank 1, in micro-batch 2 of "
            f"step {SPOILT}: " in each["error"]
        )
    path = run_dir / "diagnosis" / f"numerics-step-{SPOILT}-rank-1.json"
    finding = json.loads(path.read_text())
    assert (finding["module"], finding["phase"]) == (MODULE, direction)
    text = (path.with_suffix(".txt")).read_text()
    assert text.splitlines()[-1].split()[:3] == ["nan", "nan", direction]
    if direction == "forward":
        assert "forward transformer.h.1.mlp.c_proj (Conv1D): output" in text
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}

    prepared = replay.prepare(run_dir, SPOILT, tmp_path)
    assert prepared.first == 2
    arguments = (prepared.directory, MODULE, direction, SPOILT, 1, 2)
    ranks(2)(replayed_with_a_planted_nan, *arguments)
    again, came = replay.finding(prepared.directory), replays.outcome(prepared.directory)
    assert asdict(again) == finding  # type: ignore[arg-type]
    assert (prepared.directory / "diagnosis" / path.with_suffix(".txt").name).read_text() == text
    assert came is not None
    assert came.step == SPOILT
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(n, marks=pytest.mark.slow) for n in ENGINES[1:])]
)
def test_a_replay_repeats_every_bit_of_the_steps_and_so_does_a_watched_run(
    engine: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf, tmp_path: Path
) -> None:
    """With dropout and recomputed activations, from a checkpoint two steps before."""

    def tree(**debug: Any) -> dict[str, Any]:
        found = tree_of(tiny_tree("clm"), engine, **debug)
        found["model"] |= {"dropout": 0.1}
        found["checkpoint"] = {"keep_last": 5}
        found["trainer"] |= {"checkpoint_activations_every_blocks": 1}
        return found

    run_dir, watched = frozen_run(tree()), frozen_run(tree(numerics="watch", trace_batches=[2]))
    for each in (run_dir, watched):
        ranks(2)(whole_run, each)
    assert curve(run_dir) == curve(watched)
    assert curve(run_dir, "grad_norm") == curve(watched, "grad_norm")
    traced = watched / "diagnosis" / "ranges-step-2-rank-1-micro-batch-2.txt"
    assert "backward transformer.h.0.attn.c_attn (Conv1D): gradient of its input" in (
        traced.read_text()
    )
    prepared = replay.prepare(run_dir, 4, tmp_path)
    ranks(2)(replayed_with_a_planted_nan, prepared.directory, MODULE, "forward", 99, 1)
    came = replays.outcome(prepared.directory)
    assert came == replays.Replayed(4, None)
    (first, second) = replay.said(prepared, run_dir, came, replay.finding(prepared.directory))
    assert "of 2 logged step(s), up to 4, are those of the run, bit for bit." in first
    assert second.startswith("No module gave anything that is not finite")
