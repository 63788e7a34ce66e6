"""Where ZeRO-Infinity keeps a run's files, and what has to be there for it. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from shardwright.train.config import RankLayout, RunConfig, ZeroStrategy
from shardwright.train.errors import UserError

# What DeepSpeed itself tries before it builds its async_io operator.
_PROGRAM = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"
CUDA_DEFAULT_HOME = "/usr/local/cuda"


def directory(config: RunConfig) -> Path | None:
    """Return the run's own folder below strategy.nvme_path, or None where nothing goes there. Pure.

    DeepSpeed names its files by stage and rank alone: two runs in one folder would share them.
    """
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    if not strategy.uses_nvme or strategy.nvme_path is None:
        return None
    digest = hashlib.blake2b((config.run_dir or "").encode(), digest_size=4).hexdigest()
    return Path(strategy.nvme_path) / f"{config.name}-{digest}"


def problems(strategy: ZeroStrategy, device: str) -> Iterator[str]:
    """Yield a message for each thing that this machine lacks; creates nothing.

    ``device`` is launcher.device, for which the operator is compiled.
    """
    if not strategy.uses_nvme or strategy.nvme_path is None:
        return
    path = Path(strategy.nvme_path)
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        yield (
            f"strategy.nvme_path={path} {what} on this machine, and is not created, so that a "
            "disk that is not mounted does not fill another one; mount the disk, create the "
            "directory or name another"
        )
    elif not os.access(path, os.W_OK | os.X_OK):
        yield (
            f"strategy.nvme_path={path} is not writable; change its permissions or name another "
            "directory"
        )
    if not _is_built() and not can_be_built():
        yield (
            f"strategy.nvme_path={path}: DeepSpeed compiles its async_io operator on first use, "
            "which needs a C++ compiler and libaio with its headers; "
            "install them (Debian and Ubuntu: apt install g++ libaio-dev) or offload to cpu"
        )
    if not _is_built() and device == "cuda" and cuda_home() is None:
        yield (
            f"strategy.nvme_path={path}: with launcher.device=cuda DeepSpeed compiles its "
            "async_io operator against the CUDA toolkit, and CUDA_HOME is not set, nvcc is not in "
            "PATH and "
            "/usr/local/cuda does not exist; install the toolkit and set CUDA_HOME, or offload to "
            "cpu"
        )


def check_model(config: RunConfig, elements: Mapping[str, int], layout: RankLayout) -> None:
    """Raise UserError where a model's parameters, by name and elements, do not fit.

    DeepSpeed ends with an assertion where a buffer is too small, and notices nothing where the disk
    is full (csrc/aio/common/deepspeed_aio_common.cpp, _do_io_complete, 0.19.8): it would continue
    with what the buffers held before.
    """
    strategy, path = config.strategy, directory(config)
    if path is None:
        return
    assert isinstance(strategy, ZeroStrategy)
    parts = {name: -(-count // layout.shards) for name, count in elements.items()}
    name, largest = max(parts.items(), key=lambda part: part[1])
    if strategy.offload_parameters == "nvme" and largest > strategy.nvme_buffer_elements:
        raise UserError(
            f"strategy.nvme_buffer_elements={strategy.nvme_buffer_elements:,} is too small for a "
            f"rank's part of {name}, which has {largest:,} elements; raise it to that"
        )
    ranks = min(config.launcher.ranks_per_node, layout.world_size)
    needed = ranks * sum(parts.values()) * _bytes_per_element(config)
    # What a run that was killed has left there is written over.
    free = shutil.disk_usage(path.parent).free + _used_bytes(path)
    if free < needed:
        raise UserError(
            f"strategy.nvme_path={strategy.nvme_path} has {free / 1e9:,.1f} GB free, and what is "
            f"offloaded of {sum(elements.values()):,} parameters takes {needed / 1e9:,.1f} GB "
            f"there for {ranks} of {layout.world_size} ranks; choose a larger disk, or offload "
            "to cpu"
        )


def _used_bytes(directory: Path) -> int:
    """Return what files occupy; rglob would not bear that another rank removes some meanwhile."""
    used = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                used += os.stat(Path(folder, name)).st_blocks * 512
    return used


def _bytes_per_element(config: RunConfig) -> int:
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    parameter = config.precision.computes_in.size_bytes
    # The master, two moments at most, and the gradient, all in fp32.
    return parameter * (strategy.offload_parameters == "nvme") + 16 * (
        strategy.offload_optimizer == "nvme"
    )


def discard(config: RunConfig) -> None:
    """Remove the run's folder: nothing in it is of use once the run has ended."""
    if (path := directory(config)) is not None:
        shutil.rmtree(path, ignore_errors=True)


def _is_built() -> bool:
    """Whether DeepSpeed was installed with the operator already compiled."""
    spec = importlib.util.find_spec("deepspeed")
    places = spec.submodule_search_locations if spec else None
    return any(any(Path(place, "ops/aio").glob("async_io_op*.so")) for place in places or ())


def cuda_home() -> str | None:
    """Return where torch finds the CUDA toolkit (2.13, cpp_extension.py), without importing it.

    Without one DeepSpeed's build joins None to a path (0.19.8, op_builder/async_io.py).
    """
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home
    if nvcc := shutil.which("nvcc"):
        return os.path.dirname(os.path.dirname(nvcc))
    return CUDA_DEFAULT_HOME if os.path.exists(CUDA_DEFAULT_HOME) else None


def can_be_built() -> bool:
    """Whether DeepSpeed can compile the operator here: what it tries itself, without torch."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return False
    flags = [*os.environ.get("CFLAGS", "").split(), *os.environ.get("LDFLAGS", "").split()]
    argv = [compiler, "-x", "c++", "-", "-o", os.devnull, *flags, "-laio"]
    return subprocess.run(argv, input=_PROGRAM.encode(), capture_output=True).returncode == 0
