"""This process's membership of the process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from shardwright.train.config import RunConfig
from shardwright.train.config.trainer import COLLECTIVE_TIMEOUT_SECONDS
from shardwright.train.errors import UserError
from shardwright.train.process import cores, inherited, numerics, signals
from shardwright.train.process.leave import leave_process_group
from shardwright.train.process.open_files import raise_open_file_limit
from shardwright.train.process.rank import Rank, device_index
from shardwright.train.run_directory.failures import has_failure

LAST_WRITE_SECONDS = 600
"""How long a run that has failed waits for a checkpoint that it was writing."""
_to_finish: list[Callable[[float], object]] = []
"""What the group is left after."""


def before_leaving(finish: Callable[[float], object]) -> None:
    """Have the group left only after a function that takes the seconds it may wait at most."""
    _to_finish.append(finish)


def _finish() -> None:
    for finish in _to_finish:
        finish(LAST_WRITE_SECONDS)


@contextmanager
def member(config: RunConfig, rank: Rank) -> Iterator[None]:
    """Be a member of the process group inside the block; leave it and its threads behind after.

    strategy=single has no group. Raises UserError where the number of ranks is not the config's.
    """
    if rank.world_size not in config.launcher.world_sizes:
        raise UserError(
            f"the config requires {config.launcher.world_size} rank(s) "
            f"(launcher={config.launcher.kind}) but {rank.world_size} were started; start as "
            "many, or make a run with another launcher.nproc_per_node"
        )
    raise_open_file_limit()
    # DeepSpeed's command does not say so.
    ranks_here = int(os.environ.setdefault("LOCAL_WORLD_SIZE", str(config.launcher.ranks_per_node)))
    if config.launcher.binds_cores:
        cores.bind(rank.local_index, ranks_here)
    on_gpu = config.launcher.device == "cuda"
    device = None
    os.environ["DS_ACCELERATOR"] = config.launcher.device  # read when deepspeed is imported
    if on_gpu:
        device = torch.device("cuda", device_index(rank.local_index, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed's engine takes it for the GPU
        inherited.check_tf32(os.environ, allowed=config.precision.allow_tf32)
        numerics.set_tf32(config.precision.allow_tf32)
    if config.strategy.kind == "single":
        # accelerate makes a group wherever it finds a local rank, even a group of one.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        try:
            yield
        finally:
            _finish()
        return

    if rank.world_size == 1:
        # It meets nobody, whatever address stands there, and torchrun's own store has no use; a
        # group of one still wants an address, and accelerate its rank.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    with signals.unless(lambda: has_failure(Path(str(config.run_dir)), signals.started_at)):
        dist.init_process_group(
            # CPU tensors of GPU runs (checkpoints, objects) travel over gloo.
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
            device_id=device,
        )
    has_failed = True
    try:
        yield
        has_failed = False
    finally:
        if has_failed:
            signals.restore_defaults()
        _finish()
        leave_process_group(has_failed=has_failed)
