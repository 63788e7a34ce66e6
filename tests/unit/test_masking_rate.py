"""The share of tokens to predict, where it changes over a run: when, and in which samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shardwright.train.config import (
    BEGINNING,
    MlmObjective,
    Progress,
    RankLayout,
    RunConfig,
    TrainerConfig,
    schedule_of,
)
from shardwright.train.data import prepare
from shardwright.train.data.batches.collator import IGNORED
from shardwright.train.data.batches.loader import eval_loader, train_loader
from tests.unit.data.conftest import corpus, make_config, run_dir

__all__ = ["corpus", "make_config", "run_dir"]

FALLS: dict[str, Any] = {"masking_rate": 0.8, "masking_rate_final": 0.2}


def objective(**fields: Any) -> MlmObjective:
    return MlmObjective.model_validate({"kind": "mlm", **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"masking_rate": 0.3}, [0.3, 0.3, 0.3, 0.3, 0.3]),
        (FALLS, [0.8, 0.65, 0.5, 0.35, 0.2]),
        (
            {**FALLS, "masking_rate_schedule": "cosine"},
            [0.8, 0.5 + 0.3 / math.sqrt(2), 0.5, 0.5 - 0.3 / math.sqrt(2), 0.2],
        ),
        ({**FALLS, "masking_rate_schedule": "step"}, [0.8, 0.8, 0.2, 0.2, 0.2]),
        (
            {**FALLS, "masking_rate_schedule": "step", "masking_rate_step_at": 0.75},
            [0.8, 0.8, 0.8, 0.2, 0.2],
        ),
        ({"masking_rate": 0.1, "masking_rate_final": 0.5}, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_the_rate_follows_the_run(fields: dict[str, Any], expected: list[float]) -> None:
    asked = objective(**fields)
    found = [asked.masking_rate_at(quarter / 4) for quarter in range(5)]
    assert found == pytest.approx(expected)
    assert asked.largest_masked_share == pytest.approx(max(expected))
    every = [asked.masking_rate_at(part / 1000) for part in range(1000)]
    assert asked.mean_masked_share == pytest.approx(sum(every) / 1000, abs=1e-3)
    evaluated = asked.as_evaluated()
    assert {evaluated.masking_rate_at(done) for done in (0.0, 0.5, 1.0)} == {asked.masking_rate}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"masking_rate_schedule": "cosine"},
            "masking_rate_schedule=cosine leads from masking_rate to masking_rate_final, which is "
            "null; set masking_rate_final, or leave masking_rate_schedule out",
        ),
        (
            {**FALLS, "masking_rate_step_at": 0.7},
            "masking_rate_step_at=0.7 is read with masking_rate_schedule=step only, which is "
            "linear; set masking_rate_schedule=step or leave masking_rate_step_at out",
        ),
    ],
)
def test_what_would_not_be_read_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        objective(**fields)
    assert message in str(raised.value)


def trainer(batch: int, **fields: Any) -> TrainerConfig:
    return TrainerConfig.model_validate({"global_batch_size": batch, **fields})


def test_progress_counts_steps_or_samples_and_goes_on_where_a_run_is_resumed() -> None:
    by_steps = schedule_of(trainer(16, max_steps=8), None)
    assert [by_steps.progress_after(step) for step in (0, 2, 8, 9)] == [0.0, 0.25, 1.0, 1.0]
    resumed = schedule_of(trainer(16, max_steps=8), None, Progress(2, 32, 16, 2, 32, 16))
    assert resumed.progress_after(2) == by_steps.progress_after(4)

    grows = trainer(16, max_tokens=1, batch_warmup_from=4, batch_warmup_samples=96)
    by_samples = schedule_of(grows, 160, BEGINNING)
    # Half of the samples of a batch that grows are not half of its steps.
    assert by_samples.progress_after(1) == pytest.approx(4 / 160)
    larger = schedule_of(trainer(32, max_tokens=1), 160, Progress(5, 80, 16, 5, 80, 16))
    assert larger.progress_after(0) == pytest.approx(0.5)
    assert larger.progress_after(1) == pytest.approx(112 / 160)


@pytest.fixture
def config(corpus: Path, make_config: Callable[..., RunConfig]) -> RunConfig:
    return make_config(
        mlm=True,
        objective={**FALLS, "eval_masking_rate": 0.3},
        trainer={"max_steps": 6, "global_batch_size": 16, "micro_batch_size": 4},
    )


def labels(loader: Any) -> list[list[int]]:
    return [row for batch in loader for row in batch["labels"].tolist()]


def share(rows: list[list[int]]) -> float:
    """Return the share of labels among what may be masked, which the frame is not."""
    return sum(label != IGNORED for row in rows for label in row) / (len(rows) * 30)


def test_a_sample_is_masked_by_the_step_that_it_belongs_to(
    config: RunConfig, run_dir: Path
) -> None:
    prepared = prepare(config, run_dir)

    def batches(replicas: int = 1, workers: int = 0, done: int = 0) -> list[list[list[int]]]:
        """Return for each rank the labels of its samples."""
        fields = config.trainer.model_copy(update={"dataloader_workers": workers})
        at = Progress(done, 16 * done, 16, done, 16 * done, 16)
        return [
            labels(
                train_loader(
                    prepared,
                    config.model_copy(update={"trainer": fields}),
                    rank=rank,
                    layout=RankLayout(replicas=replicas),
                    start_sample=16 * done,
                    total_steps=6 - done,
                    schedule=schedule_of(fields, None, at),
                )
            )
            for rank in range(replicas)
        ]

    (alone,) = batches()
    shares = [share(alone[16 * step : 16 * step + 16]) for step in range(6)]
    expected = [config.objective.masking_rate_at(step / 6) for step in range(6)]  # type: ignore[union-attr]
    # Four standard deviations of a share of 480 draws.
    assert shares == pytest.approx(expected, abs=0.1)
    assert batches(workers=2) == [alone], "what is fetched ahead"
    assert batches(done=4) == [alone[64:]], "what a resume begins with"
    assert sorted(row for rank in batches(replicas=4) for row in rank) == sorted(alone)

    held_out = share(labels(eval_loader(prepared, config, rank=0, layout=RankLayout())))
    assert held_out == pytest.approx(0.3, abs=0.1)
