"""How many steps are left after a change of batch, and at which learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from shardwright.train.config import (
    BEGINNING,
    Progress,
    TrainerConfig,
    schedule_of,
    total_steps,
    why_too_short,
)
from shardwright.train.optimizer.schedule import SCHEDULES

FIRST_BATCH, WANTED = 8, 1000
"""128 samples of 64 tokens are 8,192; more of them tell schedules apart."""


def trainer(batch_size: int = FIRST_BATCH, **values: Any) -> TrainerConfig:
    length = {"max_tokens": WANTED * 64} if not {"max_steps", "max_epochs"} & set(values) else {}
    return TrainerConfig.model_validate(
        {"global_batch_size": batch_size, "micro_batch_size": 1, **length, **values}
    )


def after(steps: int, batch_size: int, before: Progress = BEGINNING) -> Progress:
    """Return where a run is after some steps of a batch."""
    samples = steps * batch_size
    return Progress(
        step=before.step + steps,
        samples=before.samples + samples,
        batch_size=batch_size,
        scheduled_steps=before.scheduled_steps + steps,
        scheduled_samples=before.scheduled_samples + samples,
        samples_per_scheduled_step=before.samples_per_scheduled_step or batch_size,
    )


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler": "linear"},
        {"lr_scheduler": "linear", "warmup_steps": 7},
        {"lr_scheduler": "cosine", "warmup_fraction": 0.13},
        {"lr_scheduler": "constant", "warmup_steps": 3},
        {"lr_scheduler": "inverse_sqrt"},
        {"lr_scheduler": "inverse_sqrt", "warmup_steps": 10},
        {"lr_scheduler": "warmup_stable_decay", "warmup_steps": 10, "decay_fraction": 0.3},
        {"lr_scheduler": "warmup_stable_decay", "warmup_fraction": 0.6, "decay_fraction": 0.6},
    ],
)
def test_a_rate_has_the_bits_of_transformers(values: dict[str, Any]) -> None:
    asked = trainer(**values)
    schedule = schedule_of(asked, WANTED)
    assert schedule.total_steps == 125
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = get_scheduler(
        SCHEDULES[asked.lr_scheduler],
        optimizer,
        num_warmup_steps=schedule.warmup_steps,
        num_training_steps=125,
        scheduler_specific_kwargs={"num_decay_steps": schedule.decay_steps}
        if asked.lr_scheduler == "warmup_stable_decay"
        else {},
    ).lr_lambdas[0]
    assert [schedule(step) for step in range(126)] == [expected(step) for step in range(126)]


@pytest.mark.parametrize(
    ("batch_size", "steps"), [(8, 125), (16, 50 + 38), (4, 50 + 150), (7, 50 + 86)]
)
def test_what_is_left_is_counted_from_what_was_consumed(batch_size: int, steps: int) -> None:
    at = after(50, FIRST_BATCH)
    assert total_steps(trainer(batch_size), WANTED, at) == steps
    trained = at.samples + (steps - at.step) * batch_size
    assert WANTED <= trained < WANTED + batch_size


def test_steps_stay_the_number_of_steps() -> None:
    at = after(50, FIRST_BATCH)
    asked = trainer(16, max_steps=125)
    assert total_steps(asked, None, at) == 125
    uninterrupted = schedule_of(trainer(max_steps=125), None)
    assert [schedule_of(asked, None, at)(step) for step in range(50, 126)] == [
        uninterrupted(step) for step in range(50, 126)
    ]


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    warmup=st.sampled_from([{"warmup_steps": 30}, {"warmup_fraction": 0.2}, {}]),
    parts=st.lists(st.tuples(st.integers(1, 30), st.sampled_from([4, 8, 16, 24])), max_size=3),
    last_batch=st.sampled_from([4, 8, 16, 24]),
)
def test_a_rate_follows_from_what_was_consumed_alone(
    name: str, warmup: dict[str, float], parts: list[tuple[int, int]], last_batch: int
) -> None:
    values: dict[str, Any] = {"lr_scheduler": name, "decay_fraction": 0.25, **warmup}
    uninterrupted = schedule_of(trainer(**values), WANTED)
    at = after(3, FIRST_BATCH)
    for steps, batch_size in parts:  # as a run does that is resumed with another batch each time
        at = after(steps, batch_size, at)
    schedule = schedule_of(trainer(last_batch, **values), WANTED, at)
    for step in range(at.scheduled_steps, at.scheduled_steps + 40):
        consumed = at.samples + (step - at.scheduled_steps) * last_batch
        assert schedule.samples(step) == consumed
        if consumed % FIRST_BATCH == 0 and consumed <= WANTED:
            assert schedule(step) == uninterrupted(consumed // FIRST_BATCH)


def test_a_warm_up_in_steps_counts_those_of_the_first_batch() -> None:
    at = after(5, FIRST_BATCH)
    schedule = schedule_of(trainer(16, lr_scheduler="constant", warmup_steps=11), WANTED, at)
    # 48 samples are left of it: three steps of 16.
    rates = [schedule(step) for step in range(5, 10)]
    assert rates == [pytest.approx(share / 11) for share in (5, 7, 9, 11, 11)]


def test_a_schedule_that_an_earlier_version_held_up_is_continued_where_it_was() -> None:
    at = Progress(
        step=50,
        samples=400,
        batch_size=8,
        scheduled_steps=47,
        scheduled_samples=376,
        samples_per_scheduled_step=8,
    )
    asked = trainer(16, lr_scheduler="linear")
    assert total_steps(asked, WANTED, at) == 50 + 38
    assert schedule_of(asked, WANTED, at)(47) == schedule_of(
        trainer(lr_scheduler="linear"), WANTED
    )(47)


@pytest.mark.parametrize(
    ("asked", "wanted", "why"),
    [
        (trainer(max_steps=10), None, None),
        (trainer(max_steps=9), None, "to have 9 steps and has 10 already (checkpoint-10)"),
        (trainer(), 80, None),
        (trainer(), 73, None),  # the last batch goes beyond it
        (trainer(4), 73, None),
        (trainer(), 72, "has 80 already (checkpoint-10); raise trainer.max_tokens"),
        (trainer(max_epochs=0.5), 72, "(trainer.max_epochs=0.5) and has 80 already"),
    ],
)
def test_what_was_consumed_cannot_be_taken_back(
    asked: TrainerConfig, wanted: int | None, why: str | None
) -> None:
    found = why_too_short(asked, wanted, after(10, 8), "checkpoint-10")
    assert (found is None) == (why is None)
    assert (why or "") in (found or "")
