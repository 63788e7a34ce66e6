"""What counts as a spike, and where a run stands that has gone back from some."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.train.charts.panels import panels
from shardwright.train.config import Progress, TrainerConfig
from shardwright.train.errors import UserError
from shardwright.train.loop.spikes.rollback import exhausted
from shardwright.train.loop.spikes.threshold import (
    Limits,
    Seen,
    Spike,
    Window,
    limit,
    seen_in,
)
from shardwright.train.loop.spikes.watch import WINDOW, SpikeWatch, seen_at
from shardwright.train.run_directory import metrics, rollbacks
from shardwright.train.run_directory.rollbacks import Rollback

CPU = torch.device("cpu")


# --- the threshold --------------------------------------------------------------------------------


def test_the_limit_lies_by_the_factor_above_the_median_in_robust_deviations() -> None:
    # Median 3; absolute deviations 2, 1, 0, 1, 97, whose median is 1.
    assert limit([1.0, 2.0, 3.0, 4.0, 100.0], factor=2.0) == pytest.approx(3 + 2 * 1.4826)
    # One more outlier, however large, moves it by a step of what is usual.
    assert limit([1.0, 2.0, 3.0, 4.0, 1e30], factor=2.0) == pytest.approx(3 + 2 * 1.4826)


def test_a_flat_curve_does_not_leap_by_noise() -> None:
    assert limit([2.0] * 9, factor=10.0) == pytest.approx(2.2)


def test_the_limit_is_a_number_that_a_device_compares_with() -> None:
    found = limit([0.1, 0.2, 0.3], factor=1.0)
    assert torch.tensor(found, dtype=torch.float32).item() == found
    assert limit([1e38, 2e38, 3e38], factor=10.0) == math.inf


def filled(losses: list[float], steps: int = 4, factor: float = 10.0) -> Window:
    window = Window(steps, factor)
    for step, loss in enumerate(losses, start=1):
        window.take(Seen(step, loss, 1.0))
    return window


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    window = filled([2.0, 2.0, 2.0, 2.0])
    assert window.limits_for(5) == Limits(math.inf, math.inf)  # which knows steps 1 to 3 alone
    assert window.limits_for(6) == Limits(limit([2.0], 10.0), limit([1.0], 10.0))


def test_a_step_is_judged_by_those_before_the_last_one_on_every_device() -> None:
    """Of the step before, a GPU may still be at work when the next one is launched."""
    window = filled([9.0, 2.0, 2.0, 2.0, 2.0, 50.0])
    assert window.limits_for(7).loss == limit([2.0], 10.0)
    # And those of spikes count, so that a level that lasts becomes the usual one.
    level = filled([2.0] * 4 + [50.0] * 4)
    assert level.limits_for(10).loss == limit([50.0], 10.0)


def test_a_step_that_is_not_finite_is_no_spike_and_is_not_remembered() -> None:
    limits = Limits(3.0, 3.0)
    assert limits.are_exceeded_by(Seen(1, 3.5, 1.0))
    assert limits.are_exceeded_by(Seen(1, 1.0, 3.5))
    assert not limits.are_exceeded_by(Seen(1, 3.0, 3.0))
    for bad in (math.nan, math.inf):
        assert not limits.are_exceeded_by(Seen(1, bad, 9.0))
        assert not limits.are_exceeded_by(Seen(1, 9.0, bad))
        window = filled([2.0, 2.0, bad, 2.0, 2.0, 2.0])
        assert window.limits_for(8).loss == limit([2.0], 10.0)


def test_a_window_is_the_same_after_it_was_written_down() -> None:
    window = filled([1.0, 1 / 3, 2.0, 0.1, 7.0, 2 / 3])
    again = Window(4, 10.0, seen_in(window.to_json()))
    assert [again.limits_for(step) for step in (7, 8)] == [window.limits_for(s) for s in (7, 8)]


def test_a_spike_names_what_leaps() -> None:
    seen = Seen(1300, 7.25, 0.5)
    assert str(Spike(seen, Limits(3.125, 1.0))) == (
        "step 1,300 is a spike: the loss 7.25 is above 3.125"
    )
    assert str(Spike(seen, Limits(3.125, 0.25))).endswith(
        ": the loss 7.25 is above 3.125 and the gradient norm 0.5 is above 0.25"
    )
    assert Spike(seen, Limits(3.125, math.inf)).values() == {
        "spike_step": 1300,
        "spike_loss": 7.25,
        "spike_loss_limit": 3.125,
        "spike_grad_norm": 0.5,
    }


# --- on a device ----------------------------------------------------------------------------------


def trainer(**values: Any) -> TrainerConfig:
    return TrainerConfig(max_steps=9, **values)


def watched(losses: list[float], **values: Any) -> tuple[list[Spike], list[bool | None]]:
    """Return what is found of steps with these losses, and which were not to update."""
    found: list[Spike] = []
    watch = SpikeWatch(trainer(spike_window_steps=4, **values), CPU, found.append)
    closed = []
    for step, loss in enumerate(losses, start=1):
        watch.begin(step)
        verdict = watch.judge(torch.tensor(loss), torch.tensor(1.0))
        closed.append(None if verdict is None else bool(verdict))
        watch.conclude(step)
    watch.settle()
    return found, closed


LOSSES = [2.0, 2.1, 1.9, 2.0, 2.0, 9.0, 2.0, math.nan]


def test_the_device_and_the_host_find_the_same() -> None:
    found, closed = watched(LOSSES, on_spike="skip_update")
    assert [spike.seen.step for spike in found] == [6]
    assert [step for step, is_closed in enumerate(closed, start=1) if is_closed] == [6]
    assert found[0].limits.loss == pytest.approx(2.0 + 10 * 1.4826 * 0.05)


def test_only_skipping_closes_the_gate() -> None:
    for on_spike in ("warn", "rollback"):
        values = {"save_every_steps": 1, "on_spike": on_spike}
        found, closed = watched(LOSSES, **values)
        assert [spike.seen.step for spike in found] == [6]
        assert closed == [None] * len(LOSSES)


def test_a_window_that_cannot_be_read_names_the_checkpoint_to_remove(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    assert seen_at(checkpoint) == []  # of a run that looked at nothing
    (checkpoint / WINDOW).write_text("[[1, 2.0]]")
    with pytest.raises(UserError, match=r"spikes\.json is refused: .*; remove checkpoint-7 to use"):
        seen_at(checkpoint)
    (checkpoint / WINDOW).write_text("[[1, 2.0, null]]")
    with pytest.raises(UserError, match=r"spikes\.json is refused"):
        seen_at(checkpoint)


# --- going back -----------------------------------------------------------------------------------

FIRST = Rollback(25, 20, samples=400, skipped_samples=80, spike={"spike_step": 25})
SECOND = Rollback(23, 20, samples=448, skipped_samples=48, spike={"spike_step": 23})


def test_what_was_skipped_counts_as_consumed_before_it_was_and_not_after() -> None:
    at_20 = Progress(step=20, samples=320, scheduled_steps=20, scheduled_samples=320)
    assert rollbacks.behind(at_20, []) == at_20
    once = rollbacks.behind(at_20, [FIRST])
    assert once == replace(at_20, samples=400, scheduled_samples=400)
    assert rollbacks.behind(at_20, [FIRST, SECOND]).samples == 448
    at_30 = replace(at_20, step=30, samples=608)
    assert rollbacks.behind(at_30, [FIRST, SECOND]) == at_30
    # From an older one, should that of step 20 be damaged: those samples are never met again.
    at_10 = replace(at_20, step=10, samples=160)
    assert rollbacks.behind(at_10, [FIRST, SECOND]).samples == 448


def test_rollbacks_are_kept_and_each_is_told_once(tmp_path: Path) -> None:
    assert rollbacks.read(tmp_path) == rollbacks.untold(tmp_path) == []
    rollbacks.append(tmp_path, FIRST)
    rollbacks.append(tmp_path, SECOND)
    assert rollbacks.read(tmp_path) == [FIRST, SECOND]
    assert rollbacks.untold(tmp_path) == [FIRST, SECOND]
    lines = [{"step": 19, "loss": 2.0}, {"step": 20, **FIRST.metrics()}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rollbacks.untold(tmp_path) == [SECOND]


def test_a_run_that_may_not_go_back_any_more_says_what_there_is_to_do() -> None:
    spike = Spike(Seen(25, 7.25, 0.5), Limits(3.125, 1.0))
    assert exhausted(spike, 20, 3) == (
        "step 25 is a spike: the loss 7.25 is above 3.125, and the run has gone back 3 times "
        "already (trainer.max_rollbacks=3). checkpoint-20 is the newest checkpoint before it; "
        "resume with a lower trainer.learning_rate, with a larger trainer.spike_factor where such "
        "steps do no harm, or with trainer.max_rollbacks=6"
    )


# --- on curves ------------------------------------------------------------------------------------


def test_each_spike_is_told_beside_curves_and_has_none_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {"spike_step": 25, "spike_loss": 7.25, "spike_grad_norm": 0.5}
    lines = [
        {"step": 19, "loss": 2.0},
        {"step": 20, "spike": "rollback", **values, "spike_skipped_samples": 1280},
        {"step": 25, "spike": "skip_update", **values},
        {"step": 25, "spike": "warn", **values},
        {"step": 26, "spike": "of a later version"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = "spike at step 25: loss 7.25, gradient norm 0.5"
    assert [(each.at_step, each.text) for each in metrics.spikes(path)] == [
        (20, f"{seen}; went back to step 20, past 1,280 samples"),
        (25, f"{seen}; its update was left out"),
        (25, seen),
    ]
    assert metrics.spikes(tmp_path / "none.jsonl") == []
    drawn = panels({"loss", *values, "spike_skipped_samples"}, one_run=True)
    assert [panel.metrics for panel in drawn] == [("loss",)]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"on_spike": "rollback"},
            "on_spike=rollback goes back to a checkpoint, but save_every_steps=null writes none "
            "before the end; set save_every_steps to a number of steps, or on_spike=skip_update",
        ),
        ({"on_spike": "warn", "spike_window_steps": 3}, "greater than or equal to 4"),
        ({"on_spike": "warn", "spike_factor": 0.0}, "greater than 0"),
        ({"on_spike": "rollback", "max_rollbacks": 0}, "greater than or equal to 1"),
        ({"on_spike": "stop"}, "'ignore', 'warn', 'skip_update' or 'rollback'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="trainer|TrainerConfig") as refused:
        trainer(**values)
    assert said in str(refused.value)
