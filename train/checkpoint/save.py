"""Save a running training as one checkpoint: engine state, schedule, RNG of each rank, manifest."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from train.checkpoint import layout, retention
from train.strategy import engine_of

if TYPE_CHECKING:
    from train.trainer import Trainer


def save(trainer: Trainer) -> Path:
    """Write checkpoint-<step> of the trainer's run and return its path. Collective."""
    step = trainer.state.global_step
    directory = trainer.run_dir / "checkpoints"
    final = directory / f"checkpoint-{step}"
    temporary = directory / f".checkpoint-{step}.tmp"
    rank, world_size = trainer.args.process_index, trainer.args.world_size

    if rank == 0:
        retention.sweep(directory)
        temporary.mkdir(parents=True)
    _barrier()

    engine_of(trainer.config).save_state(trainer, temporary)
    torch.save(_rng_state(), temporary / f"rng-{rank}.pt")
    if rank == 0:
        assert trainer.lr_scheduler is not None
        torch.save(trainer.lr_scheduler.state_dict(), temporary / "scheduler.pt")
        trainer.state.save_to_json(str(temporary / "trainer_state.json"))
    _barrier()

    # Each rank flushes and hashes its share of the files, which it finds in the page cache.
    mine = layout.files_of(temporary)[rank::world_size]
    files = _gather(layout.describe_files(mine, temporary))
    if rank == 0:
        manifest = {
            "strategy": trainer.config.strategy.model_dump(mode="json"),
            "world_size": world_size,
            "step": step,
            "samples": trainer.samples_seen,
            "tokens": trainer.tokens_seen,
            # JSON has no NaN, and NaN is never the best.
            "metrics": {
                k: v for k, v in trainer.evaluation_of_this_step().items() if math.isfinite(v)
            },
            "parameters": _parameters(trainer),
            "files": dict(sorted({k: v for part in files for k, v in part.items()}.items())),
        }
        layout.write_manifest(temporary, manifest)
        layout.publish_checkpoint(temporary, final)
    _barrier()
    # Each rank reads back what it has written, hence still has in memory, for the most part.
    wrong = [p for part in _gather(layout.verify(final, share=(rank, world_size))) for p in part]
    if rank == 0:
        retention.retain(directory, trainer.config.checkpoint, newest=step, wrong=wrong)
    _barrier()
    return final


def _parameters(trainer: Trainer) -> list[dict[str, Any]]:
    """Return name, whole shape, dtype and tied aliases of each parameter."""
    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in trainer.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    return [
        {
            "name": aliases[0],
            # ZeRO-3 leaves an empty tensor behind and notes the whole shape beside it.
            "shape": list(getattr(parameters[key], "ds_shape", parameters[key].shape)),
            "dtype": str(parameters[key].dtype).removeprefix("torch."),
            "tied": aliases[1:],
        }
        for key, aliases in names.items()
    ]


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps(
            np.random.get_state(legacy=False), default=lambda array: array.tolist()
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
