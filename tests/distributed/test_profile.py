"""trainer.profile on real gloo ranks: what is written, by whom, and that nothing else changes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.loop.profiling.parts import communication_of, steps_of
from shardwright.train.process import signals
from shardwright.train.process.rank import rank_from_environment
from tests import perfetto
from tests.browser import needs_chromium
from tests.distributed.curves import lines
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


def events_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def tree_of(tree: dict[str, Any], strategy: str = "ddp", **profile: Any) -> dict[str, Any]:
    tree["strategy"] = STRATEGIES[strategy]
    tree["model"]["dropout"] = 0.1
    tree["trainer"] |= {"max_steps": 6, "log_every_steps": 1, "profile": profile}
    return tree


def asked_on_its_second_rank(run_dir: Path) -> str:
    """Train, where a signal has come to one rank before the first step."""
    if rank_from_environment().index == 1:
        signals.request_profile()
    return whole_run(run_dir)


def values(run_dir: Path) -> list[tuple[float, ...]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in lines(run_dir) if "loss" in e]


def test_a_profile_adds_up_and_changes_no_bit(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    plain = frozen_run(tree_of(tiny_tree("clm")))
    ranks(2)(whole_run, plain)
    assert not (plain / "profile").exists()

    profiled = frozen_run(tree_of(tiny_tree("clm"), at_step=3, steps=2, ranks=[0, 1]))
    said, _ = ranks(2)(whole_run, profiled)
    assert "profiling steps 3 to 4 on ranks 0, 1, into " in said
    assert values(profiled) == values(plain)
    assert {path.name for path in (profiled / "profile").iterdir()} == {
        f"step-3-rank-{rank}.{end}" for rank in (0, 1) for end in ("txt", "trace.json.gz")
    }
    for rank in (0, 1):
        events = events_of(profiled / f"profile/step-3-rank-{rank}.trace.json.gz")
        steps = steps_of(events)
        assert [step.number for step in steps] == [3, 4]
        for step in steps:
            assert sum(step.parts.values()) == pytest.approx(step.seconds)
            assert step.parts["compute"] > 0
            assert step.parts["data"] > 0
        assert communication_of(events)[0].name == "gloo:all_reduce"
        table = (profiled / f"profile/step-3-rank-{rank}.txt").read_text()
        assert table.startswith(f"rank {rank} on ")
        assert "memory: at most " in table

    marked = {e["step"]: e.get("profiled_steps") for e in lines(profiled) if "loss" in e}
    assert marked == {1: None, 2: None, 3: 1, 4: 1, 5: 1, 6: None}
    fast = {e["step"] for e in lines(profiled) if "tokens_per_second" in e}
    assert fast == {2, 6}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp"])
def test_one_rank_that_was_asked_is_enough_under_every_engine(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf, strategy: str
) -> None:
    run_dir = frozen_run(tree_of(tiny_tree("clm"), strategy))
    said, _ = ranks(2)(asked_on_its_second_rank, run_dir)
    assert "profiling steps 1 to 3 on rank 0, into " in said
    events = events_of(run_dir / "profile/step-1-rank-0.trace.json.gz")
    steps = steps_of(events)
    assert [step.number for step in steps] == [1, 2, 3]
    for step in steps:
        assert sum(step.parts.values()) == pytest.approx(step.seconds)
        assert min(step.parts["compute"], step.parts["communication"] + step.hidden) > 0
    assert not (run_dir / "profile/step-1-rank-1.txt").exists()


@pytest.mark.slow
@needs_chromium
def test_perfetto_reads_the_trace(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf, tmp_path: Path
) -> None:
    run_dir = frozen_run(tree_of(tiny_tree("clm"), at_step=2, steps=2))
    ranks(2)(whole_run, run_dir)
    trace = run_dir / "profile/step-2-rank-0.trace.json.gz"
    with perfetto.loaded(trace, tmp_path / "perfetto") as read:
        assert not read.rows("select name from stats where severity = 'error' and value > 0")
        steps = read.rows(
            "select name, dur from slice where name glob 'ProfilerStep#*' order by ts"
        )
        reduced = read.rows("select count(*) as n from slice where name = 'gloo:all_reduce'")
    ours = steps_of(events_of(trace))
    assert [step["name"] for step in steps] == ["ProfilerStep#2", "ProfilerStep#3"]
    for theirs, step in zip(steps, ours, strict=True):
        assert int(theirs["dur"]) / 1e9 == pytest.approx(step.seconds, rel=1e-6)
    assert int(reduced[0]["n"]) > 0
