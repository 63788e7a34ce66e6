"""How many steps are left after a change of batch, and at which learning rate."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import get_scheduler

from shardwright.train.config import (
    BEGINNING,
    BatchSizes,
    Progress,
    RankLayout,
    Schedule,
    TrainerConfig,
    accumulation_steps,
    batch_sizes,
    schedule_of,
    total_steps,
    why_too_short,
)
from shardwright.train.config.optimizers import Scheduler
from shardwright.train.errors import UserError
from shardwright.train.optimizer.schedule import as_transformers

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


TENTH = {"min_learning_rate_ratio": 0.1}


def of_transformers(schedule: Schedule) -> Callable[[int], float]:
    """Return transformers' own function of the steps, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name, arguments = as_transformers(schedule, 1.0)
    found: Callable[[int], float] = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=schedule.warmup_steps,
        num_training_steps=schedule.total_steps,
        scheduler_specific_kwargs=arguments,
    ).lr_lambdas[0]
    return found


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
        {"lr_scheduler": "warmup_stable_decay", "decay_shape": "linear", "decay_fraction": 0.3},
        {"lr_scheduler": "warmup_stable_decay", "decay_shape": "sqrt", "decay_fraction": 0.3},
        {"lr_scheduler": "warmup_stable_decay", "decay_shape": "sqrt", "decay_fraction": 1.0},
        {"lr_scheduler": "warmup_stable_decay", "warmup_steps": 9, "decay_fraction": 0.0},
        {"lr_scheduler": "cosine_with_restarts", "cosine_cycles": 3, "warmup_steps": 5},
        {"lr_scheduler": "polynomial", "polynomial_power": 1.5},
        {"lr_scheduler": "warmup_stable_decay", "decay_fraction": 0.3, **TENTH},
    ],
)
def test_a_rate_has_the_bits_of_transformers(values: dict[str, Any]) -> None:
    asked = trainer(**values)
    schedule = schedule_of(asked, WANTED)
    assert schedule.total_steps == 125
    expected = of_transformers(schedule)
    assert [schedule(step) for step in range(126)] == [expected(step) for step in range(126)]


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler": "linear", "warmup_steps": 7, **TENTH},
        {"lr_scheduler": "cosine", "warmup_steps": 7, **TENTH},
        {"lr_scheduler": "polynomial", "polynomial_power": 3.0, **TENTH},
    ],
)
def test_a_floor_is_that_of_transformers(values: dict[str, Any]) -> None:
    schedule = schedule_of(trainer(**values), WANTED)
    expected = of_transformers(schedule)
    assert [schedule(step) for step in range(126)] == [
        pytest.approx(expected(step), abs=1e-15) for step in range(126)
    ]
    assert schedule(125) == pytest.approx(0.1)


def test_a_cosine_starts_again_from_the_peak_and_falls_to_the_floor() -> None:
    values: dict[str, Any] = {"lr_scheduler": "cosine_with_restarts", "cosine_cycles": 5, **TENTH}
    schedule = schedule_of(trainer(**values), WANTED)
    assert [schedule(step) for step in (0, 25, 50, 75, 100)] == [1.0] * 5
    assert schedule(12) == pytest.approx(0.55, abs=0.03)
    assert schedule(125) == schedule(500) == pytest.approx(0.1)


def test_a_range_test_multiplies_the_rate_by_as_much_each_step() -> None:
    values: dict[str, Any] = {
        "lr_scheduler": "range_test",
        "min_learning_rate_ratio": 1e-4,
        "max_steps": 5,
    }
    schedule = schedule_of(trainer(**values), None)
    assert [schedule(step) for step in range(7)] == [
        pytest.approx(share) for share in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1.0, 1.0)
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_scheduler": "range_test"}, "but min_learning_rate_ratio=0; set a share such as 1e-4"),
        (
            {"lr_scheduler": "range_test", "warmup_steps": 3, **TENTH},
            "warmup_steps=3 is a warm-up before lr_scheduler=range_test, which is one itself",
        ),
    ],
)
def test_what_contradicts_a_range_test_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        trainer(**values)


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
    name=st.sampled_from(sorted(set(get_args(Scheduler)) - {"range_test"})),
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


# --- a batch that grows -------------------------------------------------------------------------

GROWING = st.builds(
    lambda smallest, growth, samples: BatchSizes(smallest + growth, smallest, samples),
    st.integers(1, 40),
    st.integers(0, 60),
    st.integers(1, 3000),
)


@given(batches=GROWING, start=st.integers(0, 3500), steps=st.integers(0, 120))
def test_positions_are_those_of_step_after_step(
    batches: BatchSizes, start: int, steps: int
) -> None:
    position, positions = start, [start]
    for _ in range(steps):
        size = batches.at(position)
        assert batches.smallest <= size <= batches.largest
        position += size
        positions.append(position)
    assert [batches.after(start, step) for step in range(steps + 1)] == positions
    for step, (before, after) in enumerate(itertools.pairwise(positions)):
        assert batches.steps(start, before) == step
        for until in {before + 1, (before + after) // 2, after} - {before}:
            assert batches.steps(start, until) == step + 1
    # It only grows, and wherever the run is resumed it goes on as it would have.
    sizes = [after - before for before, after in itertools.pairwise(positions)]
    assert sizes == sorted(sizes)
    for step in range(0, steps, 7):
        assert batches.after(positions[step], steps - step) == position
    assert batches.at(max(start, batches.warmup_samples)) == batches.largest


def test_each_size_lasts_for_as_many_steps() -> None:
    # As published for ModernBERT-base: 768 to 4,608 over 50 billion tokens of samples of 1,024.
    batches = BatchSizes(4608, 768, 48_828_125)
    steps = batches.steps(0, batches.warmup_samples)
    assert steps == pytest.approx(48_828_125 / ((768 + 4608) / 2), rel=1e-3)
    sizes = Counter(batches.at(batches.after(0, step)) for step in range(steps))
    assert set(sizes) == set(range(768, 4608))
    assert set(sizes.values()) <= {4, 5}
    assert batches.at(batches.after(0, steps)) == 4608


def test_a_step_back_is_the_one_that_led_there() -> None:
    batches = BatchSizes(32, 8, 500)
    for step in range(1, 40):
        assert batches.after(batches.after(0, step), -1) == batches.after(0, step - 1)


@given(
    values=st.sampled_from(
        [
            {"lr_scheduler": "linear", "warmup_fraction": 0.2},
            {"lr_scheduler": "cosine", "warmup_steps": 12},
            {"lr_scheduler": "warmup_stable_decay", "decay_shape": "sqrt", "decay_fraction": 0.4},
        ]
    ),
    first=st.integers(1, 8),
    over=st.integers(1, WANTED),
    steps=st.integers(1, 60),
)
def test_a_rate_follows_from_what_a_growing_batch_has_consumed(
    values: dict[str, Any], first: int, over: int, steps: int
) -> None:
    asked = trainer(batch_warmup_from=first, batch_warmup_samples=over, **values)
    batches, schedule = batch_sizes(asked), schedule_of(asked, WANTED)
    constant = schedule_of(trainer(**values), WANTED)
    total = total_steps(asked, WANTED)
    assert batches.after(0, total - 1) < WANTED <= batches.after(0, total)
    steps = min(steps, total - 1)
    for step in range(steps):
        assert schedule.samples(step) == batches.after(0, step)
        assert schedule(step) == constant.share(batches.after(0, step) / FIRST_BATCH)
    # Resumed there: as many steps in all, at the same rates.
    consumed = batches.after(0, steps)
    at = Progress(
        step=steps,
        samples=consumed,
        batch_size=consumed - batches.after(0, steps - 1),
        scheduled_steps=steps,
        scheduled_samples=consumed,
        samples_per_scheduled_step=schedule.samples_per_step,
    )
    assert total_steps(asked, WANTED, at) == total
    resumed = schedule_of(asked, WANTED, at)
    assert [resumed(step) for step in range(steps - 1, total + 1)] == [
        schedule(step) for step in range(steps - 1, total + 1)
    ]
    assert why_too_short(asked, WANTED, at, "checkpoint") is None
    assert why_too_short(asked, batches.after(0, steps - 1), at, "checkpoint") is not None


def test_a_run_of_steps_has_as_many_however_the_batch_grows() -> None:
    asked = trainer(max_steps=50, batch_warmup_from=2, batch_warmup_samples=200)
    assert total_steps(asked, None) == 50
    schedule, constant = schedule_of(asked, None), schedule_of(trainer(max_steps=50), None)
    assert [schedule(step) for step in range(51)] == [constant(step) for step in range(51)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_warmup_from": 4}, "batch_warmup_from=4 and batch_warmup_samples=0 say how"),
        ({"batch_warmup_samples": 9}, "batch_warmup_from=null and batch_warmup_samples=9 say how"),
        (
            {"batch_warmup_from": 9, "batch_warmup_samples": 9},
            "batch_warmup_from=9 is more than global_batch_size=8, to which the batch grows",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(**values)


def test_the_smallest_batch_has_a_sample_for_each_micro_batch() -> None:
    asked = trainer(32, micro_batch_size=4, batch_warmup_from=7, batch_warmup_samples=9)
    with pytest.raises(
        UserError,
        match=r"batch_warmup_from=7 has not a sample for each of the 8 micro-batches of a step "
        r"\(4 accumulation steps x 2 rank\(s\)\); set trainer.batch_warmup_from=8 or more",
    ):
        accumulation_steps(asked, RankLayout(replicas=2))
    eight = asked.model_copy(update={"batch_warmup_from": 8})
    assert accumulation_steps(eight, RankLayout(replicas=2)) == 4
