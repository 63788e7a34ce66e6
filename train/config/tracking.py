"""The section "tracking": where metrics go besides metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from shardwright.train.config.section import Section, Strings


class NoTracking(Section):
    """Only metrics.jsonl."""

    kind: Literal["none"]


class TensorboardTracking(Section):
    """TensorBoard event files under the run directory."""

    kind: Literal["tensorboard"]


class WandbTracking(Section):
    """Weights & Biases."""

    kind: Literal["wandb"]
    project: str | None = None
    """null is WANDB_PROJECT, or else shardwright."""
    entity: str | None = None
    """null is WANDB_ENTITY, or else the key's own."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is WANDB_MODE, or else online where an API key is found and offline where there is none;
    the run's first lines say which."""
    tags: Strings = ()
    """None are WANDB_TAGS."""


TrackingConfig = Annotated[
    NoTracking | TensorboardTracking | WandbTracking, Field(discriminator="kind")
]


# --- what the environment says of W&B -------------------------------------------------------------

_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_CAUTION = ("online", "offline", "disabled")


def wandb_mode(environment: Mapping[str, str]) -> str | None:
    """Return the mode that WANDB_DISABLED or WANDB_MODE ask for, None where neither does. Pure.

    A word that W&B does not know asks for nothing; `wandb_problems` names it.
    """
    if environment.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    return _MODES.get(environment.get("WANDB_MODE", "").lower())


def most_cautious_mode(configured: str, by_environment: str | None) -> str:
    """Return which of both a rank takes: that which reaches for less, as on a node without a
    network. Pure."""
    return max(configured, by_environment or configured, key=_CAUTION.index)


def wandb_project(tracking: WandbTracking, environment: Mapping[str, str]) -> str:
    return tracking.project or environment.get("WANDB_PROJECT") or "shardwright"


def wandb_name(name: str, environment: Mapping[str, str]) -> str:
    """Return the name of the run: a config that has chosen none leaves it to WANDB_NAME. Pure."""
    return environment.get("WANDB_NAME", name) if name == "run" else name


def wandb_problems(tracking: WandbTracking, environment: Mapping[str, str]) -> list[str]:
    """Return a message where the environment contradicts the config. Pure."""
    said = environment.get("WANDB_MODE", "")
    if said and said.lower() not in _MODES:
        return [f"WANDB_MODE={said} is not known; use online, offline or disabled, or unset it"]
    mode = wandb_mode(environment)
    if mode is not None and tracking.mode not in ("auto", mode):
        name = "WANDB_DISABLED" if environment.get("WANDB_DISABLED") else "WANDB_MODE"
        return [
            f"tracking.mode={tracking.mode}, but {name}={environment[name]} requests {mode}; "
            f"unset {name}, or set tracking.mode={mode}"
        ]
    return []


def wandb_unused(name: str, tracking: WandbTracking, environment: Mapping[str, str]) -> list[str]:
    """Return the variables of the environment that the config's own words replace. Pure."""
    used = {
        "WANDB_PROJECT": wandb_project(tracking, environment),
        "WANDB_NAME": wandb_name(name, environment),
        "WANDB_ENTITY": tracking.entity,
        "WANDB_TAGS": ",".join(tracking.tags) or None,
    }
    return [
        f"{variable}={environment[variable]}"
        for variable, value in used.items()
        if value is not None and environment.get(variable, value) != value
    ]
