"""Model and optimizer state as torch distributed checkpoints, for DDP and FSDP alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

if TYPE_CHECKING:
    from train.trainer import Trainer


def save_model_and_optimizer(trainer: Trainer, directory: Path) -> None:
    """Write ``directory/engine``: each rank its shards; replicated tensors are written once."""
    optimizer = trainer.torch_optimizer()
    model_state, optimizer_state = get_state_dict(trainer.model, optimizer)
    dcp.save(
        {"model": model_state, "optimizer": optimizer_state},
        checkpoint_id=directory / "engine",
        no_dist=not dist.is_initialized(),
    )
