"""Configs for each strategy."""

from __future__ import annotations

from typing import Any

from shardwright.train.config import RunConfig, from_tree
from tests.unit.trees import TREE


def config(**sections: Any) -> RunConfig:
    return from_tree({**TREE, **sections})
