"""The section "checkpoint": what is kept of those written, and what happens to a failed one."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shardwright.train.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


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
    best_metric: Literal[
        "eval_loss", "eval_perplexity", "eval_masked_accuracy", "eval_own_loss"
    ] = "eval_loss"
    """What "best" means to keep_best and to early stopping: low loss (eval_own_loss: that of
    objective.loss) or perplexity, high accuracy
    (of masked tokens)."""
    export: Literal["last", "best", "average"] = "last"
    """Whose weights final/ gets: the last step's, the best checkpoint's that is kept, or the
    average that trainer.average_weights keeps."""

    push_to: str | None = None
    """Push to this repository of a hub while the run trains, NAME or OWNER/NAME, from a process of
    its own; null pushes nothing. The token is that of `hf auth login`, or HF_TOKEN."""
    push_every: Literal["final", "save", "checkpoints"] = "final"
    """What is pushed: final/ once the run ends; besides it each save, made into a model; or besides
    it each checkpoint as it is, of which the repository keeps the newest."""
    push_private: bool = True
    """Make the repository a private one where it is missing; one that is there has to fit."""
    push_revision: Literal["main", "step"] = "main"
    """Where saves go: to the main branch, one over another, or to a branch step-N for each."""
    push_wait_seconds: PositiveFloat = 600.0
    """How long the end of the run waits for the push of final/."""

    @model_validator(mode="after")
    def _pushes_are_asked_for(self) -> Self:
        if self.push_to is None:
            for name, value in without_pushes().items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is read where a run is pushed, and "
                        "push_to=null pushes nothing; set checkpoint.push_to"
                    )
        elif not re.fullmatch(r"([\w.-]+/)?[\w.-]+", self.push_to):
            raise ValueError(
                f"push_to={self.push_to} is not a repository's name on a hub; give NAME or "
                "OWNER/NAME"
            )
        elif self.push_every == "final" and self.push_revision == "step":
            raise ValueError(
                "push_revision=step gives each save a branch, and push_every=final pushes none; "
                "set checkpoint.push_every=save, or push_revision=main"
            )
        return self

    @property
    def higher_is_better(self) -> bool:
        return self.best_metric == "eval_masked_accuracy"


def without_pushes() -> dict[str, Any]:
    """Return the fields of a run that pushes nothing. Pure."""
    fields = CheckpointConfig.model_fields
    return {name: field.default for name, field in fields.items() if name.startswith("push_")}
