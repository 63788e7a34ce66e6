"""The section "checkpoint": what is kept of those written, and what happens to a failed one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwright.train.config.section import NonNegativeInt, PositiveInt, Section


class CheckpointConfig(Section):
    """How checkpoints are written, and what is kept of those that trainer.save_every_steps asks."""

    asynchronous: bool = Field(default=False, alias="async")
    """``checkpoint.async``: copy the state to host memory (as much as the files hold) and write it
    while training continues; a checkpoint exists once it is written."""
    on_save_error: Literal["warn", "stop"] = "warn"
    """Where the disk is full, read-only or gone: warn, train on and try again at the next save, or
    stop the run. The save at the end of a run always stops it."""

    keep_last: PositiveInt = 2
    """Newest checkpoints to keep; older ones are deleted once the newest is verified."""
    keep_every_steps: PositiveInt | None = None
    """Keep each checkpoint permanently whose step is a multiple of this; null keeps none."""
    keep_best: NonNegativeInt = 0
    """Also keep this many with the best best_metric, of those evaluated at their step; 0 keeps
    none for that."""
    best_metric: Literal["eval_loss", "eval_perplexity", "eval_masked_accuracy"] = "eval_loss"
    """What "best" means to keep_best and to early stopping: low loss or perplexity, high accuracy
    (of masked tokens)."""
    export: Literal["last", "best", "average"] = "last"
    """Whose weights final/ gets: the last step's, the best checkpoint's that is kept, or the
    average that trainer.average_weights keeps."""

    @property
    def higher_is_better(self) -> bool:
        return self.best_metric == "eval_masked_accuracy"
