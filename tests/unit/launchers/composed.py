"""The shipped conf/, composed."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from shardwright.launchers.composition.compose import CONF, compose
from shardwright.train.config import RunConfig, from_tree


def composed(*overrides: str) -> tuple[dict[str, Any], RunConfig]:
    (job,) = compose(list(overrides))
    tree = OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True)
    assert isinstance(tree, dict)
    return tree, from_tree(tree)  # type: ignore[return-value]


PRESETS = sorted(
    path.stem
    for path in (CONF / "model").glob("*.yaml")
    if path.stem not in ("pretrained", "from_config")
)
