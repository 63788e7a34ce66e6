"""An optimizer of the user's own steps a sharded tensor, as FSDP has it: on one rank, a shard each.

Which operations torch knows for sharded tensors shows on one rank already.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from shardwright.train.config import RunConfig
from shardwright.train.config.strategy import FsdpStrategy
from shardwright.train.errors import UserError
from shardwright.train.optimizer import trial
from shardwright.train.own_parts import part, said


def check(config: RunConfig) -> None:
    """Raise UserError where a run under FSDP could not step. In a process without a group."""
    if not isinstance(config.strategy, FsdpStrategy):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    asked = part(trial.KEY, str(config.trainer.custom_class))
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder, "store")), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            values = [torch.ones(shape) for shape in trial.SHAPES]
            sharded = [distribute_tensor(value, mesh, [Shard(0)]) for value in values]
            parameters = [torch.nn.Parameter(each) for each in sharded]
            optimizer = trial.made(
                config.trainer,
                [{"params": parameters, "weight_decay": config.trainer.weight_decay}],
            )
            for _ in range(trial.STEPS):
                for parameter in parameters:
                    parameter.grad = parameter.detach().clone()
                optimizer.step()
        except UserError:  # it cannot be made, under any engine
            raise
        except Exception as error:  # whatever torch, or code of the user's, raises
            raise asked.wrong(
                "its step does not work on the sharded tensors of strategy=fsdp: "
                f"{said(error)}; choose strategy=ddp, or operations that torch knows for DTensors"
            ) from error
        finally:
            dist.destroy_process_group()
