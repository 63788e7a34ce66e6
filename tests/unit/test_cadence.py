"""Evaluations, saves and logs by steps, tokens or epochs: after which steps they come."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.train.config import BatchSizes, Rhythm, from_tree, rhythm
from shardwright.train.config.cadence import NEVER, Cadence
from shardwright.train.errors import UserError
from tests.unit.strategy.configs import config
from tests.unit.trees import TREE


def of(samples_at: Any = lambda step: 8 * step, **trainer: Any) -> Rhythm:
    """Return the rhythm of a run of samples of 64 tokens, 100 in an epoch."""
    data = {**TREE["data"], "sequence_length": 64}
    found = config(trainer={**TREE["trainer"], **trainer}, data=data)
    return rhythm(found, 100, samples_at)


def steps(when: Rhythm, cadence: Cadence, until: int = 40) -> list[int]:
    return [step for step in range(1, until + 1) if when.is_due(cadence, step)]


def test_where_nobody_says_it_is_logged_every_ten_steps() -> None:
    when = of()
    assert [step for step in range(1, 31) if when.is_logged(step)] == [1, 10, 20, 30]
    assert when.evaluate == when.save == NEVER
    assert not when.save
    assert [s for s in range(1, 31) if of(log_every_steps=7).is_logged(s)] == [1, 7, 14, 21, 28]


def test_tokens_are_counted_over_all_ranks_in_whole_samples() -> None:
    when = of(eval_every_tokens=64 * 20, log_every_tokens=64 * 8, save_every_tokens=64 * 8 * 3 - 1)
    assert steps(when, when.evaluate, 11) == [3, 5, 8, 10], "every 20 of 8 samples a step"
    assert all(when.is_logged(step) for step in range(1, 9))
    assert steps(when, when.save, 9) == [3, 6, 9]


def test_an_epoch_ends_within_a_step() -> None:
    when = of(eval_every_epochs=1.0, save_every_epochs=0.25)
    assert steps(when, when.evaluate) == [13, 25, 38], "100 of 8 samples a step"
    assert steps(when, when.save, 13) == [4, 7, 10, 13]
    tenth = of(eval_every_epochs=0.1).evaluate
    assert tenth.samples == 10, "as it is written: 0.1 is a hair more in binary"


def test_a_batch_that_grows_is_counted_by_what_it_takes() -> None:
    sizes = BatchSizes(16, 4, 64)
    when = of(lambda step: sizes.after(0, step), eval_every_tokens=64 * 16)
    positions = [sizes.after(0, step) for step in range(13)]
    due = steps(when, when.evaluate, 12)
    assert due == [s for s in range(1, 13) if positions[s] // 16 > positions[s - 1] // 16]
    assert due != list(range(1, 13))


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 60), st.fractions(Fraction(1, 9), 90))
def test_a_resume_on_any_batch_keeps_the_rhythm(
    before: int, after: int, at: int, every: Fraction
) -> None:
    """Between any two multiples there is one time, wherever the batch has changed."""

    def samples_at(step: int) -> int:
        return before * min(step, at) + after * max(0, step - at)

    when = Rhythm(evaluate=Cadence(samples=every), samples_at=samples_at)
    due = steps(when, when.evaluate, 120)
    crossed = {int(samples_at(step) // every) for step in range(121)}
    assert len(due) == len(crossed) - 1
    resumed = Rhythm(
        evaluate=Cadence(samples=every),
        samples_at=lambda step: before * at + after * (step - at),
    )
    assert [s for s in due if s > at] == [s for s in steps(resumed, when.evaluate, 120) if s > at]


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    return {**TREE, **{name: {**TREE.get(name, {}), **values} for name, values in sections.items()}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"trainer": {"eval_every_steps": 5, "eval_every_tokens": 90}},
            "eval_every_steps=5 and eval_every_tokens=90 say twice how often; give one of "
            "eval_every_steps, eval_every_tokens and eval_every_epochs, and set the others to null",
        ),
        (
            {"trainer": {"save_every_tokens": 5, "save_every_epochs": 0.5}},
            "save_every_tokens=5 and save_every_epochs=0.5 say twice how often",
        ),
        (
            {"trainer": {"log_every_steps": 5, "log_every_tokens": 9}},
            "log_every_steps=5 and log_every_tokens=9 say twice how often",
        ),
        ({"trainer": {"eval_every_epochs": 0.0}}, "trainer.eval_every_epochs=0.0: must be more"),
        (
            {"trainer": {"eval_every_epochs": 1.0}, "data": {"eval_fraction": 0.0}},
            "trainer.eval_every_epochs=1.0 needs held-out documents, but data.eval_fraction=0.0 "
            "holds out none; raise it, give data.eval_paths or set trainer.eval_every_epochs=null",
        ),
        (
            {
                "trainer": {"save_every_epochs": 1.0},
                "data": {"stages": [{"tokens": 999}, {}], "sequence_length": 64},
            },
            "trainer.save_every_epochs=1.0 counts passes over the training samples, and each of "
            "data.stages has samples of its own; give trainer.save_every_tokens or",
        ),
        (
            {"trainer": {"save_every_tokens": 99}, "checkpoint": {"keep_every_steps": 5}},
            "checkpoint.keep_every_steps=5 keeps checkpoints by their step, and "
            "trainer.save_every_tokens=99 writes them at steps that are no multiples of it; set",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        from_tree(changed(**sections))


def test_what_needs_evaluations_or_saves_takes_those_by_tokens() -> None:
    trainer = {"eval_every_tokens": 640, "save_every_tokens": 640, "on_spike": "rollback"}
    found = from_tree(
        changed(
            trainer={**trainer, "early_stopping_patience": 2},
            checkpoint={"keep_best": 1, "export": "best"},
            data={"eval_fraction": 0.1},
        )
    )
    assert found.trainer.cadence("save") == {"save_every_tokens": 640}


def test_an_older_config_means_what_it_did() -> None:
    older = {k: v for k, v in TREE["trainer"].items() if not k.endswith(("_tokens", "_epochs"))}
    length = {"max_steps": 9, "log_every_steps": 10}
    found = from_tree({**TREE, "trainer": {**older, **length, "eval_every_steps": 4}})
    when = rhythm(found, 100)
    assert (when.log, when.evaluate, when.save) == (Cadence(10), Cadence(4), NEVER)
