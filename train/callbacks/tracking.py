"""TensorBoard and Weights & Biases, through transformers' own callbacks."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import TrainerCallback

from train.config import RunConfig


def tracker_callbacks(config: RunConfig, run_dir: Path) -> tuple[list[TrainerCallback], str | None]:
    """Return the tracker's callbacks and a line that says where it writes. For rank 0 alone."""
    tracking = config.tracking
    if tracking.kind == "tensorboard":
        from transformers.integrations import TensorBoardCallback

        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard")
        return [TensorBoardCallback()], f"tensorboard --logdir {run_dir / 'tensorboard'}"
    if tracking.kind == "wandb":
        assert tracking.mode != "auto", "resolved before the config is frozen"
        os.environ["WANDB_MODE"] = tracking.mode
        os.environ["WANDB_PROJECT"] = tracking.project
        os.environ["WANDB_DIR"] = str(run_dir)
        os.environ["WANDB_NAME"] = config.name
        if tracking.tags:  # wandb takes an empty variable for one empty tag, and refuses it
            os.environ["WANDB_TAGS"] = ",".join(tracking.tags)
        if tracking.entity is not None:
            os.environ["WANDB_ENTITY"] = tracking.entity
        from transformers.integrations import WandbCallback

        later = f"; later: wandb sync {run_dir}/wandb/offline-run-*"
        return [WandbCallback()], f"wandb {tracking.mode}{later * (tracking.mode == 'offline')}"
    return [], None
