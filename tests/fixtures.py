"""What the shared fixtures give, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

TreeOf = Callable[[str], dict[str, Any]]
"""From an objective to a small config as a tree."""
Freeze = Callable[[dict[str, Any]], Path]
"""From a tree to a new run directory that holds it."""
RanksOf = Callable[[int], Any]
"""From a world size to its ranks, a `tests.distributed.pool.Ranks` that all tests share."""
