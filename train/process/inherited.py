"""What an environment says that a run does not take from it: who ranks are, and what engine runs.

A shell may be a rank of something else (a cluster's, a notebook's, a step of srun), and may have
been set up for another program that stands on the same libraries. A run's launcher sets what says
who its ranks are, and the run's config decides the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from shardwright.train.errors import UserError

RANKS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "CROSS_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("LOCAL_SIZE", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT", "SHARDWRIGHT_RANKS_OF"),
)
"""Who a rank is, by the names of torchrun, DeepSpeed and Shardwright."""
RANKS_OF_TORCHRUN = ("PET_", "TORCHELASTIC_")
"""What begins so are torchrun's flags, and what it tells its ranks."""
RANKS_OF_MPI = (
    *("MPI_LOCALRANKID", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_"),
    *("PMIX_RANK", "PMIX_NAMESPACE", "PMIX_SERVER_", "PALS_"),
)
"""What begins so is MPI's, and where accelerate and DeepSpeed look for ranks as well.

SLURM's are not among it: no library takes a rank from them, and srun and mpirun start by them.
"""
_ENGINE = (
    *("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_"),
    *("XLA_USE_BF16", "XLA_DOWNCAST_BF16", "FORK_LAUNCHED", "SMDATAPARALLEL_"),
)
"""What begins so has accelerate and transformers build another engine than they are told to."""
_DEBUGGING = {"ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH"}
_NOTHING = {"", "0", "no", "none", "false", "default"}
"""What `accelerate launch` says where nothing is asked of it."""


def of_ranks(names: Iterable[str]) -> list[str]:
    """Return the variables that say who a rank is. Pure."""
    return [n for n in names if n in RANKS or n.startswith(RANKS_OF_TORCHRUN + RANKS_OF_MPI)]


def of_engine(names: Iterable[str]) -> list[str]:
    """Return the variables that decide what a run's config decides. Pure."""
    return [n for n in names if n.startswith(_ENGINE) and n not in _DEBUGGING]


def forget_engine(environment: MutableMapping[str, str]) -> list[str]:
    """Remove what would decide the engine; return what of it asked for something, as NAME=value."""
    removed = {name: environment.pop(name) for name in of_engine(list(environment))}
    return [f"{n}={value}" for n, value in removed.items() if value.lower() not in _NOTHING]


def forget_mpi(environment: MutableMapping[str, str]) -> None:
    """Remove what MPI says of ranks, once it is known who this one is."""
    for name in [name for name in environment if name.startswith(RANKS_OF_MPI)]:
        del environment[name]


def check_tf32(environment: MutableMapping[str, str], *, allowed: bool) -> None:
    """Raise UserError where NVIDIA's libraries are told otherwise than precision.allow_tf32."""
    asked = environment.get("NVIDIA_TF32_OVERRIDE", "")
    if asked in ("0", "1") and (asked == "1") != allowed:
        raise UserError(
            f"NVIDIA_TF32_OVERRIDE={asked} in the environment overrides "
            f"precision.allow_tf32={str(allowed).lower()} behind torch; unset it"
        )


CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_THAT_REPEATS = (":4096:8", ":16:8")
"""Of NVIDIA's documentation of cuBLAS; torch raises with any other."""
FLASH_ATTENTION = "FLASH_ATTENTION_DETERMINISTIC"
"""transformers (5.23) hands it to flash_attention_2 at each call."""


def of_determinism(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Return the variables by which libraries choose kernels that repeat. Pure.

    Raises UserError where the environment has another value of one.
    """
    accepted = {CUBLAS: CUBLAS_THAT_REPEATS, FLASH_ATTENTION: ("1",)}
    for name, values in accepted.items():
        if (asked := environment.get(name)) not in (None, "", *values):
            raise UserError(
                f"{name}={asked} in the environment contradicts trainer.deterministic=true, which "
                f"needs {' or '.join(values)}; unset it"
            )
    return {name: environment.get(name) or values[0] for name, values in accepted.items()}


def said(names: Iterable[str]) -> str:
    """Return what a user is told of variables that decide nothing; empty where none do. Pure."""
    if not (listed := ", ".join(sorted(names))):
        return ""
    return f"{listed} in the environment: ignored, as the run's launcher and config decide that"
