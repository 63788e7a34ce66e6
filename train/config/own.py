"""Which fields name parts of the user's own, and what these mean from any directory."""

from __future__ import annotations

from typing import Any

from shardwright.train import own_parts
from shardwright.train.config.run import RunConfig

CALLBACKS = "trainer.callbacks"
OPTIMIZER = "trainer.custom_class"
LOSS = "objective.loss"
SOURCE = "data.source"
FIELDS = (CALLBACKS, OPTIMIZER, LOSS, SOURCE, "data.filter")


def named(config: RunConfig) -> list[tuple[str, str]]:
    """Return field and text of each part that a config names. Pure."""
    found: list[tuple[str, str]] = []
    for key in FIELDS:
        section, field = key.split(".")
        value: Any = getattr(getattr(config, section), field, None)
        texts = value if isinstance(value, tuple) else () if value is None else (value,)
        found += [(key, text) for text in texts]
    return found


def with_parts_located(config: RunConfig) -> RunConfig:
    """Return a config whose parts are named by texts that mean them from any directory.

    Without those of the section "data", which sources locate themselves.
    """
    trainer, objective = config.trainer, config.objective
    callbacks = tuple(own_parts.located(CALLBACKS, text) for text in trainer.callbacks)
    custom = trainer.custom_class and own_parts.located(OPTIMIZER, trainer.custom_class)
    loss = objective.loss and own_parts.located(LOSS, objective.loss)
    return config.model_copy(
        update={
            "trainer": trainer.model_copy(update={"callbacks": callbacks, "custom_class": custom}),
            "objective": objective.model_copy(update={"loss": loss}),
        }
    )


def same_part(before: Any, after: Any) -> bool:
    """Return whether two texts name a part by the same name, wherever its file lies. Pure."""
    if not isinstance(before, str) or not isinstance(after, str):
        return bool(before == after)
    return before.rpartition(":")[2] == after.rpartition(":")[2]
