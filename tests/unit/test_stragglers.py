"""What is told of the times of ranks, and which of them is named."""

from __future__ import annotations

import pytest

from shardwright.train.charts.panels import panels
from shardwright.train.config import rhythm
from shardwright.train.loop import step_times, stragglers
from shardwright.train.loop.ahead import Ahead
from shardwright.train.loop.stragglers import LOGS, Watch
from tests.unit.strategy.configs import config
from tests.unit.trees import TREE

Times = step_times.Times
EVEN = [Times(0.10, 0.02, 0.01), Times(0.11, 0.01, 0.01), Times(0.10, 0.02, 0.01)]
SLOW = [Times(0.10, 0.12, 0.01), Times(0.20, 0.02, 0.01), Times(0.10, 0.12, 0.01)]
SLOW_DATA = [Times(0.10, 0.12, 0.01), Times(0.10, 0.02, 0.11), Times(0.10, 0.12, 0.01)]
STARVED = [Times(0.10, 0.02, 0.09)] * 3


def watch() -> Watch:
    return Watch(lambda rank: f"node{rank}")


def said(*logs: list[step_times.Times]) -> list[str]:
    looks = watch()
    return [text for ranks in logs for text in looks.look(ranks)]


def test_a_line_tells_least_median_most_and_who() -> None:
    told = stragglers.metrics(SLOW)
    assert told["compute_seconds/min"] == 0.10
    assert told["compute_seconds/median"] == 0.10
    assert told["compute_seconds/max"] == 0.20
    assert told["compute_most_rank"] == 1
    assert told["wait_most_rank"] == 0
    assert len(told) == 12
    shown = panels(told, one_run=True)
    assert [panel.name for panel in shown] == [
        *("compute_seconds_of_sets", "data_seconds_of_sets", "wait_seconds_of_sets")
    ]
    assert shown[0].title == "Compute seconds of a step, of the ranks"


def test_a_slow_rank_is_named_with_its_node_once() -> None:
    assert said(*[SLOW] * (LOGS - 1)) == []
    (text,) = said(*[SLOW] * (LOGS + 4))
    assert text == (
        "warning: rank 1 on node node1 is slow: of each step 200 ms go into computing, 100 ms on "
        "the others, which wait for it; 3 logs in a row"
    )
    (text,) = said(*[SLOW_DATA] * LOGS)
    assert "rank 1 on node node1 is slow: of each step 110 ms go into its data, 10 ms on" in text


def test_it_is_said_again_once_it_was_otherwise() -> None:
    assert said(*[SLOW] * 2, EVEN, *[SLOW] * 2) == []
    assert len(said(*[SLOW] * LOGS, EVEN, *[SLOW] * LOGS)) == 2


@pytest.mark.parametrize("ranks", [EVEN, SLOW[:1], STARVED])
def test_nobody_is_slow_who_is_like_the_others(ranks: list[step_times.Times]) -> None:
    assert stragglers.slow(ranks) == set()


def test_of_two_ranks_the_slower_one() -> None:
    assert stragglers.slow(SLOW[:2]) == {1}
    assert stragglers.slow([SLOW[1], SLOW[0]]) == {0}


def test_starvation_is_named_as_such() -> None:
    (text,) = said(*[STARVED] * (LOGS + 2))
    assert text == (
        "warning: training waits for data, 43% of each step (90 ms of 210 ms); raise "
        "trainer.dataloader_workers, or look at the disk that data.cache_dir is on"
    )


def test_times_are_gathered_at_logged_steps_alone() -> None:
    when = rhythm(config(trainer={**TREE["trainer"], "log_every_steps": 5}), 100)
    assert [step for step in range(1, 12) if when.is_logged(step)] == [1, 5, 10]
    ahead = Ahead([], labels=5, tokens=7, stops=False, judged=None, times=[3, 2, 1])
    assert list(ahead.agreed())[:2] == [5, 7]
    assert ahead.times == [3, 2, 1]
    assert step_times.times_of_ranks(ahead.times) == [Times(3e-6, 2e-6, 1e-6)]
    assert step_times.times_of_ranks([0, 0, 0]) is None
    assert step_times.times_of_ranks([]) is None


def test_a_step_is_computing_waiting_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0

    def pass_by(nanoseconds: int) -> None:
        nonlocal now
        now += nanoseconds

    monkeypatch.setattr(step_times.time, "perf_counter_ns", lambda: now)
    times = step_times.StepTimes()
    for _ in range(2):
        times.begin()
        with times.waiting_for_data():
            pass_by(5_000_000)
        pass_by(20_000_000)
        step_times.waits.add(8_000_000)
        times.on_step_end(None, None, None)
        pass_by(10**12)  # an evaluation
    assert times.take() == [12_000, 8_000, 5_000]
    assert times.take() == [0, 0, 0]
