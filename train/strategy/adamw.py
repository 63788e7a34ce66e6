"""The AdamW of every engine that has none of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train.config import RunConfig

if TYPE_CHECKING:
    import torch


def adamw(
    config: RunConfig, groups: list[dict[str, Any]], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return torch's, fused."""
    import torch

    return torch.optim.AdamW(groups, fused=True, **settings)
