"""What a plan has a rank send, against what live engines were counted to send; and by hand."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.collectives import RUN, STRATEGIES
from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.config import RankLayout, RunConfig
from shardwright.train.plan.facts import ModelFacts
from shardwright.train.plan.model import facts_of, planned
from shardwright.train.plan.traffic import (
    Collective,
    Group,
    Traffic,
    group_of,
    sent_bytes,
    traffic,
)
from tests.unit.launchers.composed import composed

COUNTED = json.loads(
    (Path(__file__).parents[2] / "benchmarks/results/collectives-cpu.json").read_text()
)["strategies"]


def run(*overrides: str) -> RunConfig:
    _, found = composed(*RUN, *overrides)
    return resolve(found, Machine(cores=2), "/runs/a")


@cache
def model() -> ModelFacts:
    config = run("strategy=ddp")
    return facts_of(planned(config), config)


def of(*overrides: str) -> Traffic:
    return traffic(run(*overrides), model())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_sends_what_was_counted(strategy: str) -> None:
    found = of(f"strategy={strategy}", *STRATEGIES[strategy])
    # Where nothing is kept gathered, a head that is tied is gathered once more for the embedding.
    off = 0.03 if strategy == "zero3" else 0.01
    assert sum(map(_volume, found.collectives)) == pytest.approx(COUNTED[strategy]["sent"], rel=off)


def _volume(each: Collective) -> float:
    item = 2 if each.name == "all-gather" else 4
    times = 2 if each.name == "all-reduce" else 1
    share = (each.group.ranks - 1) / each.group.ranks
    return times * share * each.size_bytes / item / model().count


def test_what_is_sent_of_what_all_have_together() -> None:
    assert sent_bytes("all-reduce", Group(4, 2), 100) == 150
    assert sent_bytes("all-gather", Group(4, 2), 100) == 75
    assert sent_bytes("all-gather", Group(1, 1), 100) == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_of_ddp_sends_its_gradients_by_the_ranks_that_are_there(ranks: int) -> None:
    config = run("strategy=ddp")
    found = traffic(config, model(), ranks).sent_bytes
    assert found == 2 * (ranks - 1) / ranks * 4 * model().count
    assert traffic(config, model(), 1).sent_bytes == 0


def test_who_meets_whom() -> None:
    layout = RankLayout(replicas=4, shards=8)
    assert group_of(layout, 8, "shards") == Group(8, 8)
    assert group_of(layout, 8, "replicas") == Group(4, 1)
    assert group_of(layout, 16, "replicas") == Group(4, 2)
    assert group_of(RankLayout(shards=32), 8, "shards") == Group(32, 8)
    assert Group(32, 8).nodes == 4


def test_what_an_engine_runs_beside_the_arithmetic() -> None:
    def beside(*overrides: str) -> list[bool]:
        return [each.is_overlapped for each in of(*overrides).collectives]

    assert beside("strategy=ddp") == [True]
    assert beside("strategy=zero0") == [False]
    assert beside("strategy=zero2") == [False, False]
    assert beside("strategy=zero2", "strategy.overlap_communication=true") == [True, False]
    assert set(beside("strategy=fsdp")) == {True}


def test_zero_3_gathers_once_what_it_keeps() -> None:
    def gathered(*overrides: str) -> float:
        found = of("strategy=zero3", "strategy.persistence_elements=0", *overrides)
        return sum(e.size_bytes for e in found.collectives if e.phase == "backward") - (
            2 * 4 * model().count
        )

    assert gathered() == 0, "all of it is used again within a billion elements"
    half = gathered(f"strategy.max_reuse_distance_elements={model().count}")
    assert half == pytest.approx(2 * 2 * model().count / 2, rel=0.01)


def test_what_is_offloaded_is_copied() -> None:
    def copied(*overrides: str) -> dict[Any, float]:
        found: dict[Any, float] = {}
        for each in of(*overrides).copies:
            found[each.link, each.phase] = found.get((each.link, each.phase), 0) + each.size_bytes
        return found

    part = model().count / 1024
    # Two micro-batches: gradients there, back and there again, then once more as fp32.
    zero2 = copied("strategy=zero2_offload")
    assert zero2 == {("host", "backward"): part * (3 * 4 + 4), ("host", "update"): part * 2}
    fsdp = copied("strategy=fsdp_offload")
    assert fsdp == {("host", "forward"): part * 2 * 4, ("host", "backward"): part * 2 * (4 + 4)}
    nvme = copied("strategy=zero3_nvme", "strategy.nvme_path=/tmp")
    assert nvme["disk", "update"] == part * (2 * 12 + 2)
    assert copied("strategy=fsdp") == {}


def test_muon_sends_each_matrix_to_be_worked_on() -> None:
    hidden = sum(p.elements for p in model().parameters if p.is_hidden_matrix)
    assert hidden == 2 * 12 * 1024**2
    (_, dealt) = of("strategy=ddp", "trainer.optimizer=muon").collectives
    assert (dealt.phase, dealt.size_bytes, dealt.calls) == ("update", 2 * hidden, 8)
