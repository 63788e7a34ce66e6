"""The benchmark of the loop runs from end to end on a CPU, and its figures add up on paper."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.overhead import Plan, freeze, shown, summary
from benchmarks.timed_overhead import Turns
from shardwright.launchers.machine.facts import Machine

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_composes(ranks: int, tmp_path: Path) -> None:
    config = freeze(Plan([ranks], 10, 40, Machine(cores=2)), ranks, tmp_path / "run")
    assert config.trainer.max_steps == 420
    assert config.strategy.kind == ("single" if ranks == 1 else "ddp")
    assert config.trainer.log_every_steps == config.trainer.max_steps, "no step is to be logged"


def test_the_ways_take_turns_and_are_timed_by_themselves() -> None:
    order: list[str] = []

    def train(way: str) -> Callable[[Callable[[], None]], None]:
        def trained(ended: Callable[[], None]) -> None:
            if way == "b":
                gc.disable()
            for _ in range(4):
                order.append(f"{way}{'' if gc.isenabled() else ' without collection'}")
                ended()

        return trained

    turns = Turns(["a", "b"], steps=2)
    turns.run({way: train(way) for way in ("a", "b")})
    assert (
        order == ["a"] * 2 + ["b without collection"] * 2 + ["a"] * 2 + ["b without collection"] * 2
    )
    assert {way: [len(turn) for turn in of if turn] for way, of in turns.of_each.items()} == {
        "a": [2, 2],
        "b": [2, 2],
    }
    assert gc.isenabled()


def test_a_way_that_fails_ends_the_others() -> None:
    def fails(ended: Callable[[], None]) -> None:
        ended()
        raise ValueError("no")

    def trains(ended: Callable[[], None]) -> None:
        for _ in range(100):
            ended()

    with pytest.raises(ValueError, match="no"):
        Turns(["a", "b"], steps=1).run({"a": fails, "b": trains})


def test_taxes_are_differences_of_a_round_and_the_first_step_of_a_turn_does_not_count() -> None:
    def turn(milliseconds: float) -> list[tuple[float, float]]:
        return [(9.0, 9.0), *[(milliseconds / 1e3, milliseconds / 2e3)] * 3]

    figures = summary(
        {
            "bare": [turn(10), turn(30), turn(10)],
            "stock": [turn(12), turn(33), turn(12)],
            "ours": [turn(11), turn(31), turn(10)],
        }
    )
    assert figures["tax_ms"] == pytest.approx({"stock": 2, "ours": 1})
    assert figures["ratio"] == pytest.approx(2)
    assert figures["cpu_ratio"] == pytest.approx(2)
    assert figures["ms_per_step"] == pytest.approx({"bare": 10, "stock": 12, "ours": 11})
    assert "2.00" in shown({"ranks": {"1": figures}}).splitlines()[-1]


def test_no_ratio_is_given_where_nothing_is_paid() -> None:
    turn = [(0.01, 0.01)] * 3
    figures = summary({"bare": [turn], "stock": [turn], "ours": [turn]})
    assert figures["ratio"] is None


@pytest.mark.slow
def test_it_measures_the_three_ways_here(tmp_path: Path) -> None:
    file = tmp_path / "overhead.json"
    argv = [sys.executable, "-m", "benchmarks.overhead", "--ranks", "1", "--steps", "3"]
    subprocess.run(
        [*argv, "--repeats", "2", "--json", str(file)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=True,
    )
    results: dict[str, Any] = json.loads(file.read_text())
    figures = results["ranks"]["1"]
    assert {way: len(each) for way, each in figures["ms_per_step_of_each_round"].items()} == {
        "bare": 2,
        "stock": 2,
        "ours": 2,
    }
    assert min(figures["ms_per_step"].values()) > 0
