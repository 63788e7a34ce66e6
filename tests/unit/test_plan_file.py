"""plan.json: what is kept of plans and measurements over a run's starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.run_directory import plan
from shardwright.train.run_directory.plan import Measured, Planned, Start, differences, settings_of
from tests.unit.launchers.composed import composed

PLANNED = Planned(
    device_bytes=110,
    host_bytes=0,
    disk_bytes=0,
    by_category={"weights": 60, "activations": 50},
    parameters_bytes=60,
    gradients_bytes=30,
    optimizer_bytes=20,
    step_seconds=2.0,
    tokens_per_second=50.0,
)
MEASURED = Measured(
    device="cuda", peak_bytes=100, optimizer_bytes=20, steps=4, seconds=10.0, tokens=400
)


def settings(*overrides: str) -> dict[str, Any]:
    words = ("model=gpt2_tiny", "strategy=zero2", "launcher.nproc_per_node=2", *overrides)
    _, config = composed(*words)
    return settings_of(resolve(config, Machine(cores=2), "/runs/a"))


def test_both_halves_are_kept_in_whatever_order_they_come(tmp_path: Path) -> None:
    mine = settings()
    assert plan.newest(tmp_path, mine) == Start(mine)
    plan.note(tmp_path, mine, measured=MEASURED)
    plan.note(tmp_path, mine, planned=PLANNED)
    (start,) = plan.read(tmp_path)
    assert start == Start(json.loads(json.dumps(mine)), PLANNED, MEASURED)
    assert plan.newest(tmp_path, mine) == start
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["version"] == 1
    assert found["starts"][0]["measured"]["step_seconds"] == 2.5
    assert found["starts"][0]["measured"]["tokens_per_second"] == 40


def test_other_settings_begin_anew_and_what_was_stays(tmp_path: Path) -> None:
    mine, others = settings(), settings("trainer.micro_batch_size=2")
    assert mine != others
    assert mine == settings("trainer.learning_rate=1"), "which costs nothing"
    plan.note(tmp_path, mine, planned=PLANNED)
    assert plan.newest(tmp_path, others) == Start(others)
    plan.note(tmp_path, others, measured=MEASURED)
    first, second = plan.read(tmp_path)
    assert (first.planned, second.planned) == (PLANNED, None)
    assert plan.newest(tmp_path, mine) == Start(mine), "the newest start was another"


def test_a_resume_goes_on_measuring() -> None:
    later = Measured(device="cuda", peak_bytes=90, reserved_bytes=7, steps=6, seconds=10.0)
    both = MEASURED.continued(later)
    assert (both.peak_bytes, both.reserved_bytes, both.optimizer_bytes) == (100, 7, 20)
    assert both.step_seconds == 2.0
    assert both.tokens_per_second == 20.0
    assert both.resident_bytes is None


def test_what_is_compared_is_what_both_have() -> None:
    found = {each.name: each for each in differences(Start({}, PLANNED, MEASURED))}
    assert list(found) == ["peak_bytes", "optimizer_bytes", "step_seconds", "tokens_per_second"]
    assert found["peak_bytes"].missed == pytest.approx(0.10)
    assert found["step_seconds"].missed == pytest.approx(-0.2)
    assert differences(Start({}, PLANNED)) == differences(Start({}, None, MEASURED)) == []
    assert Measured(device="cpu").step_seconds is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"starts": [{}]}', '{"starts": [3]}'])
def test_a_file_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    assert plan.read(tmp_path) == []


def test_what_a_newer_version_adds_is_left_out(tmp_path: Path) -> None:
    plan.note(tmp_path, {"ranks": 1}, planned=PLANNED, measured=MEASURED)
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"planned": {', '"planned": {"new": 1,'))
    assert plan.read(tmp_path) == [Start({"ranks": 1}, PLANNED, MEASURED)]
