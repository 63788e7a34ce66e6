"""Who this process is among its peers; without torch, whose import takes seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shardwright.train.errors import UserError
from shardwright.train.process import inherited


@dataclass(frozen=True)
class Rank:
    """One of ``world_size`` processes: ``index`` over all nodes, ``local_index`` on its own."""

    index: int
    local_index: int
    world_size: int


def device_index(local_index: int, devices_in_sight: int) -> int:
    """Return the GPU of a rank among those that it sees, as accelerate does. Pure.

    Where each task of a node is shown its own GPU alone (--gpus-per-task, --gpu-bind=single, MIG),
    that is its first, whatever its local index. Two ranks that come by this to one GPU are found by
    NCCL. Raises UserError where there is none.
    """
    if devices_in_sight == 0:
        raise UserError(
            "launcher.device=cuda, and this rank sees no GPU "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); ask for "
            "GPUs where the ranks run, or set launcher.device=cpu"
        )
    return local_index % devices_in_sight


# What mpirun and srun call a rank's number, its number on the node and their count.
_NAMES_OF = {
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
}


def rank_from_environment() -> Rank:
    """Read what torchrun and its like set; without it this is the only rank.

    SHARDWRIGHT_RANKS_OF says that a launcher has names of its own. What else MPI's say is removed,
    as accelerate and DeepSpeed read it too. Raises UserError where the variables fit no rank.
    """
    if names := _NAMES_OF.get(os.environ.get("SHARDWRIGHT_RANKS_OF", "")):
        for ours, theirs in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), names, strict=True):
            os.environ[ours] = os.environ[theirs]
    inherited.forget_mpi(os.environ)
    found = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    try:
        rank = Rank(
            index=int(found["RANK"] or 0),
            local_index=int(found["LOCAL_RANK"] or 0),
            world_size=int(found["WORLD_SIZE"] or 1),
        )
    except ValueError:
        rank = Rank(index=-1, local_index=-1, world_size=0)
    if not 0 <= rank.local_index <= rank.index < rank.world_size:
        said = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
        raise UserError(
            f"no rank is determined by {said} in the environment; unset them, or start all ranks "
            "by `shardwright resume` or torchrun, which set all three"
        )
    return rank
