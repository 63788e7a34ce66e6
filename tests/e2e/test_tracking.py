"""Trackers write below the run directory, and need no network for it."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from tests.e2e.conftest import Run

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("run", ["clm"], indirect=True)
def test_tensorboard_gets_what_metrics_get(run: Run) -> None:
    directory = run.directory / "tensorboard"
    assert f"tensorboard --logdir {directory}\n" in run.ended.stdout
    events = EventAccumulator(str(directory))
    events.Reload()
    lines = [json.loads(x) for x in (run.directory / "metrics.jsonl").read_text().splitlines()]
    tags = {
        "loss": "train/loss",
        "tokens_per_second": "train/tokens_per_second",
        "eval_loss": "eval/loss",
    }
    for name, tag in tags.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (line["step"], pytest.approx(line[name])) for line in lines if name in line
        ]


@pytest.mark.parametrize("run", ["mlm"], indirect=True)
def test_wandb_writes_offline_and_says_how_to_send_it(run: Run) -> None:
    later = f"wandb offline; later: wandb sync {run.directory}/wandb/offline-run-*\n"
    assert later in run.ended.stdout
    (offline,) = (run.directory / "wandb").glob("offline-run-*")
    (record,) = offline.glob("run-*.wandb")
    assert b"eval/loss" in record.read_bytes()
