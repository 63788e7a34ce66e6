"""What can go wrong before a rank starts."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launchers.machine import directories, hostfile, memory
from launchers.machine.facts import Machine, lacking
from train.config import (
    OPTIMIZERS,
    DeepspeedLauncher,
    RunConfig,
    SlurmLauncher,
)
from train.config.tracking import WandbTracking, wandb_problems
from train.data.sources.registry import source_of
from train.errors import UserError
from train.paths import not_a_directory
from train.program import PACKAGES, package_environment
from train.strategy import engine_of


def check(config: RunConfig, machine: Machine) -> None:
    """Raise UserError, one line for each problem, where a resolved config cannot run here.

    Leaves nothing: whether its directory can be made is tried beside it.
    """
    assert config.run_dir is not None, "resolved"
    if problems := [
        *_run_dir_problems(Path(config.run_dir)),
        *_missing_directories(config),
        *_machine_problems(config, machine),
    ]:
        raise UserError("\n".join(problems))

    from train.data import check_corpus

    check_corpus(config.data)


def check_place(config: RunConfig) -> None:
    """Raise UserError where a run's directory cannot be made."""
    if problems := _run_dir_problems(Path(str(config.run_dir))):
        raise UserError("\n".join(problems))


def check_machine(config: RunConfig, machine: Machine) -> None:
    """Raise UserError where a run that has its directory and data already cannot go on here."""
    if problems := _machine_problems(config, machine):
        raise UserError("\n".join(problems))


def _machine_problems(config: RunConfig, machine: Machine) -> list[str]:
    if config.launcher.kind == "slurm":
        # This is a login node: what GPUs, disks and compilers there are, the ranks find out.
        return [
            *_missing_packages(config),
            *_slurm_problems(config),
            *_tracking_problems(config, machine),
        ]
    return [
        *lacking(config.launcher.device, config.launcher.ranks_per_node, config.precision, machine),
        *memory.problems(config, machine),
        *_launcher_problems(config),
        *_missing_packages(config),
        *engine_of(config).machine_problems(),
        *_missing_build_tools(config),
        *_tracking_problems(config, machine),
    ]


def _launcher_problems(config: RunConfig) -> Iterator[str]:
    """Yield a message for each program that a launcher needs and this machine does not have."""
    launcher = config.launcher
    if not isinstance(launcher, DeepspeedLauncher):
        return
    # ompi_info tells Open MPI from another's mpirun.
    programs = {"pdsh": ["pdsh"], "openmpi": ["mpirun", "ompi_info"], "slurm": ["srun"]}
    if launcher.hostfile is not None:
        missing = [name for name in programs[launcher.backend] if shutil.which(name) is None]
        for program in missing[:1]:
            yield (
                f"launcher.backend={launcher.backend} starts ranks with {program}, which is not "
                "installed; install it, choose another backend, or launcher=torchrun"
            )
        if launcher.backend != "pdsh" and (launcher.include or launcher.exclude):
            yield (
                f"launcher.backend={launcher.backend} accepts only whole hostfiles, but "
                "launcher.include or exclude is given; write another hostfile, or set "
                "backend=pdsh"
            )
        elif launcher.backend == "slurm":
            yield from _allocation_problems(launcher)
        unsafe = [
            p for p in (sys.executable, str(PACKAGES)) if not re.fullmatch(r"[\w@%+=:,./-]+", p)
        ]
        if launcher.backend == "pdsh" and unsafe:
            yield (
                f"launcher.backend=pdsh sends {unsafe[0]} through a shell unquoted, which would "
                "break it; install to a path without blanks and quotes, or use launcher=torchrun"
            )
        path = package_environment(os.environ)["PYTHONPATH"]
        if launcher.backend != "pdsh" and not re.fullmatch(r"[\w@%+=:,./-]+", path):
            yield (
                f"launcher.backend={launcher.backend} gets PYTHONPATH={path} from DeepSpeed in "
                "quotes, which the ranks would treat as part of it; install to a path without "
                "blanks and quotes, or use launcher=torchrun"
            )
    if launcher.bind_cores_to_rank and shutil.which("numactl") is None:
        yield (
            "launcher.bind_cores_to_rank=true needs numactl, which is not installed; install it "
            "(apt install numactl) or leave it out"
        )


def _allocation_problems(launcher: DeepspeedLauncher) -> Iterator[str]:
    """Yield a message where srun would start ranks elsewhere than the hostfile says."""
    if "SLURM_JOB_ID" not in os.environ:
        yield (
            "launcher.backend=slurm starts ranks with srun inside an allocation, and this is "
            "not one; start with salloc, or set launcher=slurm, which submits a job"
        )
        return
    wanted = list(hostfile.hosts(Path(str(launcher.hostfile)).read_text(encoding="utf-8")))
    ended = subprocess.run(
        ["scontrol", "show", "hostnames"], capture_output=True, text=True, check=False
    )
    if (allocated := ended.stdout.split()) != wanted:
        yield (
            f"launcher.hostfile={launcher.hostfile} has {', '.join(wanted)}, but the allocation "
            f"is {', '.join(allocated) or ended.stderr.strip()}, and the ranks' rendezvous is on "
            "the host of srun's first rank; write it with: scontrol show hostnames | sed 's/$/ "
            f"slots={launcher.ranks_per_node}/'"
        )


def _slurm_problems(config: RunConfig) -> Iterator[str]:
    launcher, run_dir = config.launcher, str(config.run_dir)
    assert isinstance(launcher, SlurmLauncher)
    if "%" in run_dir or "\\" in run_dir:
        yield (
            f"run_dir={run_dir} holds % or a backslash, which SLURM replaces in the path of a "
            "job's log; choose another"
        )
    if launcher.site is not None and not os.access(launcher.site, os.R_OK):
        yield (
            f"launcher.site={launcher.site} cannot be read; copy slurm/site.example.sh there, or "
            "leave it out"
        )


def _run_dir_problems(run_dir: Path) -> list[str]:
    if "\0" in str(run_dir):
        return ["run_dir holds a NUL character; choose another"]
    if os.path.lexists(run_dir):
        return [directories.exists(run_dir)]
    nearest = next(parent for parent in run_dir.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        return [f"run_dir={run_dir} cannot be created: {nearest} is not a directory"]
    for name in run_dir.relative_to(nearest).parts:
        if len(os.fsencode(name)) > (most := os.pathconf(nearest, "PC_NAME_MAX")):
            return [
                f"run_dir={run_dir} cannot be created: a name of {len(os.fsencode(name))} bytes is "
                f"longer than the {most} that {nearest} takes; choose a shorter one"
            ]
    try:  # access(2) promises what root, NFS and /proc do not keep
        os.rmdir(tempfile.mkdtemp(prefix=".shardwright-", dir=nearest))
    except OSError as error:
        is_refused = error.errno in _READ_ONLY or not os.access(nearest, os.W_OK | os.X_OK)
        reason = "no permission to write to" if is_refused else f"{error.strerror}:"
        return [
            f"run_dir={run_dir} cannot be created: {reason} {nearest}; give a directory that is "
            "writable"
        ]
    return []


_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def _missing_directories(config: RunConfig) -> Iterator[str]:
    """Yield a message for each name that can only be a path, and leads nowhere."""
    for section, given in (("model", config.model), ("tokenizer", config.tokenizer)):
        if given.kind == "pretrained":
            yield from not_a_directory(f"{section}.name", given.name, f"the {section}")
    yield from source_of(config.data).misplaced()


def _missing_packages(config: RunConfig) -> list[str]:
    optimizer = config.trainer.optimizer
    package = OPTIMIZERS[optimizer].package
    needed = {
        "tracking=tensorboard": ("tensorboard", config.tracking.kind == "tensorboard"),
        "tracking=wandb": ("wandb", config.tracking.kind == "wandb"),
        f"precision.fp8_recipe={config.precision.fp8_recipe}": (
            "torchao",
            config.precision.fp8_recipe is not None,
        ),
        f"strategy.kind={config.strategy.kind}": (
            config.strategy.package or "",
            config.strategy.package is not None,
        ),
        f"trainer.optimizer={optimizer}": (package or "", package is not None),
    }
    return [
        f"{setting} needs the package {package}, which is not installed; `pip install {package}`"
        for setting, (package, wanted) in needed.items()
        if wanted and importlib.util.find_spec(package) is None
    ]


def _missing_build_tools(config: RunConfig) -> Iterator[str]:
    """Yield a message for each setting that is compiled in the ranks, but not here."""
    compilers = [os.environ.get("CXX"), "c++", "g++"]
    has_compiler = any(shutil.which(name) for name in compilers if name)
    optimizer = config.trainer.optimizer
    if OPTIMIZERS[optimizer].is_compiled and not has_compiler:
        yield (
            f"trainer.optimizer={optimizer} is compiled on its first use, but there is no C++ "
            "compiler (c++ or g++); install one, or set trainer.optimizer=adamw"
        )
    if getattr(config.strategy, "cpu_adam", "torch") == "deepspeed":
        # pip puts ninja beside the interpreter, which an inactive venv does not have in its PATH.
        path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
        missing = [] if has_compiler else ["C++ compiler (c++ or g++)"]
        missing += [] if shutil.which("ninja", path=path) else ["ninja"]
        if missing:
            yield (
                "strategy.cpu_adam=deepspeed is compiled on its first use, but there is no "
                f"{' and no '.join(missing)}; install what is missing, or set "
                "strategy.cpu_adam=torch"
            )


def _tracking_problems(config: RunConfig, machine: Machine) -> list[str]:
    if not isinstance(config.tracking, WandbTracking):
        return []
    if problems := wandb_problems(config.tracking, os.environ):
        return problems
    if config.tracking.mode == "online" and not machine.has_wandb_key:
        return [
            "tracking.mode=online, but there is no API key; run `wandb login`, set WANDB_API_KEY, "
            "or choose tracking.mode=offline"
        ]
    return []
