"""Configs for each strategy."""

from __future__ import annotations

from typing import Any

from tests.unit.trees import TREE
from train.config import RunConfig, from_tree


def config(**sections: Any) -> RunConfig:
    return from_tree({**TREE, **sections})
