"""How long a rank may stand where it is."""

from __future__ import annotations

import pytest

from shardwright.train.config.trainer import TrainerConfig
from shardwright.train.diagnosis.beats import GONE, STOPPED, TRACED, Beat
from shardwright.train.diagnosis.patience import Patience, Setting
from shardwright.train.process.heartbeat import Phase

ALL = [phase for phase in Phase if phase is not Phase.ENDED]


def beat(
    phase: Phase, *, state: str = "S", step_seconds: float = 1.0, save_seconds: float = 0.0
) -> Beat:
    return Beat(
        rank=0,
        host="a",
        pid=1,
        count=1,
        step=3,
        phase=phase,
        still_seconds=0.0,
        longest_step_seconds=step_seconds,
        longest_save_seconds=save_seconds,
        state=state,
    )


@pytest.mark.parametrize(
    ("found", "seconds"),
    [
        (beat(Phase.COMPUTE), 120.0),
        (beat(Phase.DATA, step_seconds=30.0), 600.0),
        (beat(Phase.OPTIMIZER, step_seconds=0.0), 1800.0),
        (beat(Phase.EVALUATION), 600.0),
        (beat(Phase.EVALUATION, step_seconds=60.0), 1200.0),
        (beat(Phase.SAVE), 1800.0),
        (beat(Phase.SAVE, save_seconds=400.0), 4000.0),
        (beat(Phase.ENDING), 1800.0),
        (beat(Phase.COMPILE), 1800.0),
        (beat(Phase.STARTING), None),
        (beat(Phase.STARTING, state=STOPPED), 120.0),
        (beat(Phase.COMPUTE, state=GONE), 90.0),
    ],
)
def test_auto_goes_by_what_the_rank_has_taken_itself(found: Beat, seconds: float | None) -> None:
    assert Patience("auto", grace_seconds=30.0).seconds(found) == seconds


@pytest.mark.parametrize(
    ("found", "seconds"),
    [
        (beat(Phase.COMPUTE), 5.0),
        (beat(Phase.OPTIMIZER, step_seconds=0.0), 5.0),
        (beat(Phase.EVALUATION), 5.0),
        (beat(Phase.SAVE), 5.0),
        (beat(Phase.SAVE, save_seconds=2.0), 20.0),
        (beat(Phase.COMPILE), 1800.0),
        (beat(Phase.STARTING), None),
        (beat(Phase.STARTING, state=STOPPED), 5.0),
        (beat(Phase.COMPUTE, state=GONE), 30.0),
    ],
)
def test_a_number_is_taken_at_its_word(found: Beat, seconds: float | None) -> None:
    assert Patience(5.0, grace_seconds=30.0).seconds(found) == seconds


@pytest.mark.parametrize("setting", ["auto", 5.0])
def test_neither_the_end_nor_a_debugger_counts(setting: Setting) -> None:
    assert Patience(setting).seconds(beat(Phase.ENDED, state=GONE)) is None
    assert Patience(setting).seconds(beat(Phase.COMPUTE, state=TRACED)) is None


@pytest.mark.parametrize("phase", ALL)
def test_null_waits_as_long_as_it_takes(phase: Phase) -> None:
    assert Patience(None).seconds(beat(phase, state=STOPPED)) is None


@pytest.mark.parametrize("seconds", [1.0, 1800.5])
def test_a_timeout_that_cannot_act_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=rf"hang_timeout_seconds={seconds:g} is not between 2 and"):
        TrainerConfig(max_steps=1, hang_timeout_seconds=seconds)
    assert TrainerConfig(max_steps=1, hang_timeout_seconds=None).hang_timeout_seconds is None
    assert TrainerConfig(max_steps=1).hang_timeout_seconds == "auto"
