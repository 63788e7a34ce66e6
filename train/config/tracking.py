"""The section "tracking": where metrics go besides metrics.jsonl."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from train.config.section import Section, Strings


class NoTracking(Section):
    """Only metrics.jsonl."""

    kind: Literal["none"]


class TensorboardTracking(Section):
    """TensorBoard event files under the run directory."""

    kind: Literal["tensorboard"]


class WandbTracking(Section):
    """Weights & Biases."""

    kind: Literal["wandb"]
    project: str = "shardwright"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    """auto is online where an API key is found, else offline, and says which."""
    tags: Strings = ()


TrackingConfig = Annotated[
    NoTracking | TensorboardTracking | WandbTracking, Field(discriminator="kind")
]
