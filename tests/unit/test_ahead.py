"""What is told of the next step while one runs, and when that would be too early."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from shardwright.train.config import rhythm
from shardwright.train.loop.ahead import Ahead, counted
from shardwright.train.loop.callbacks.garbage import GarbageCollection
from shardwright.train.loop.callbacks.handler import Callbacks
from shardwright.train.strategy.finite import Numbers
from tests.unit.strategy.configs import config
from tests.unit.trees import TREE


def test_labels_and_tokens_are_counted_without_padding() -> None:
    ids = torch.arange(8).view(2, 4)
    labels = torch.tensor([[1, -100, 3, -100], [-100, -100, -100, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert counted([{"input_ids": ids, "labels": labels}], -100) == (3, 8)
    padded = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    assert counted([padded, padded], -100) == (6, 10)
    assert counted([], -100) == (0, 0)


@pytest.mark.parametrize(
    ("judged", "not_finite"),
    [
        (None, [0, 0]),
        (Numbers(3, 1.0, 2.0), [0, 0]),
        (Numbers(3, math.inf, 2.0), [1, 0]),
        (Numbers(3, 1.0, math.nan), [0, 1]),
    ],
)
def test_alone_a_rank_agrees_with_itself(judged: Numbers | None, not_finite: list[int]) -> None:
    ahead = Ahead([], labels=5, tokens=7, stops=True, judged=judged)
    assert list(ahead.agreed()) == [5, 7, 1, *not_finite, 0, 0]
    watched = Ahead([], labels=5, tokens=7, stops=False, judged=judged, alarm=True)
    assert watched.agreed().alarms == 1


def test_who_was_asked_for_a_profile_tells_all() -> None:
    ahead = Ahead([], labels=5, tokens=7, stops=False, judged=None, profile=True)
    assert ahead.agreed().profiles == 1


def test_nothing_is_agreed_before_what_takes_long_or_ends_the_run() -> None:
    """A signal may come meanwhile."""
    cadences = {"save_every_steps": 4, "eval_every_steps": 6}
    when = rhythm(config(trainer={**TREE["trainer"], **cadences}), 100)
    assert [step for step in range(1, 14) if when.is_interrupted(step, 13)] == [4, 6, 8, 12, 13]
    assert not rhythm(config(), 100).is_interrupted(4, 13)


# --- what else comes with each step ---------------------------------------------------------------


def test_garbage_waits_for_its_step_and_is_pythons_again_afterwards() -> None:
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            collected.append(info["generation"])

    callback, state = GarbageCollection(3), TrainerState()
    gc.callbacks.append(note)
    try:
        with callback.in_force():
            collected.clear()
            assert not gc.isenabled()
            for step in range(1, 8):
                state.global_step = step
                callback.on_step_end(None, state, None)
            assert collected == [1, 1]
            with callback.left_to_python():
                assert gc.isenabled()
            assert not gc.isenabled()
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()


def test_garbage_is_left_to_python_where_nothing_is_asked_for() -> None:
    callback = GarbageCollection(None)
    with callback.in_force():
        assert gc.isenabled()
        callback.on_step_end(None, TrainerState(global_step=4), None)


def test_only_callbacks_with_something_to_do_are_called() -> None:
    called: list[str] = []

    class Busy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            called.append("busy")
            control.should_log = True
            return control

    class Idle(TrainerCallback):
        pass

    class Late(Busy):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            called.append("late")
            assert kwargs["model"] == "the model"

    handler = Callbacks([Busy(), Idle()], "the model", None, None, None)
    control = handler.on_step_end(None, TrainerState(), TrainerControl())  # type: ignore[arg-type]
    assert control.should_log
    handler.add_callback(Late())
    handler.on_step_end(None, TrainerState(), control)  # type: ignore[arg-type]
    assert called == ["busy", "busy", "late"]
    handler.remove_callback(Busy)
    handler.on_step_end(None, TrainerState(), control)  # type: ignore[arg-type]
    assert called[3:] == ["late"]
    assert [each.__class__ for each in handler._busy["on_step_end"]] == [Late]
