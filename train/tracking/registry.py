"""Which module feeds which kind of tracker: a line for each, found by the section of the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwright.train.config import RunConfig
from shardwright.train.config.tracking import (
    MlflowTracking,
    TensorboardTracking,
    TrackingSection,
    TrackioTracking,
    WandbTracking,
)
from shardwright.train.tracking.mlflow import Mlflow
from shardwright.train.tracking.tensorboard import Tensorboard
from shardwright.train.tracking.tracker import Say, Tracker
from shardwright.train.tracking.trackio import Trackio
from shardwright.train.tracking.wandb import Wandb

TRACKERS: dict[type[TrackingSection], type[Tracker[Any]]] = {
    TensorboardTracking: Tensorboard,
    WandbTracking: Wandb,
    MlflowTracking: Mlflow,
    TrackioTracking: Trackio,
}
"""All but `none`, for which no process is started."""


def tracker_of(config: RunConfig, run_dir: Path, say: Say, *, is_offline: bool) -> Tracker[Any]:
    """Return what feeds the tracker that a config asks for."""
    kind = TRACKERS[type(config.tracking)]
    return kind(config, config.tracking, run_dir, say, is_offline=is_offline)
