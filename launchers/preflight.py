"""What can go wrong before a rank starts."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shardwright.launchers import own_parts
from shardwright.launchers.machine import directories, memory
from shardwright.launchers.machine.facts import Machine, lacking
from shardwright.launchers.machine.names import unusable_checkpoint
from shardwright.launchers.registry import launcher_of
from shardwright.train.config import (
    OPTIMIZERS,
    NamedModel,
    PretrainedTokenizer,
    RunConfig,
    packages,
)
from shardwright.train.data.sources.registry import source_of
from shardwright.train.data.tokens import rank_file
from shardwright.train.errors import UserError, not_installed
from shardwright.train.model import user_modules
from shardwright.train.paths import not_a_directory
from shardwright.train.publishing import requirements
from shardwright.train.strategy import engine_of


def check(config: RunConfig, machine: Machine) -> None:
    """Raise UserError, one line for each problem, where a resolved config cannot run here.

    Leaves nothing: whether its directory can be made is tried beside it.
    """
    assert config.run_dir is not None, "resolved"
    if problems := [
        *_run_dir_problems(Path(config.run_dir)),
        *_missing_directories(config),
        *_of_preparations(config),
        *_machine_problems(config, machine),
    ]:
        raise UserError("\n".join(problems))

    from shardwright.train.data import check_corpus

    check_corpus(config.data)


def check_data(config: RunConfig) -> None:
    """Raise UserError where a resolved config's data cannot be prepared, whatever trains on them.

    Reads the beginning of each file, and downloads nothing.
    """
    if problems := list(_missing_directories(config)):
        raise UserError("\n".join(problems))

    from shardwright.train.data import check_corpus

    check_corpus(config.data)


def check_job(config: RunConfig) -> None:
    """Raise UserError where a cluster cannot be given a job of a resolved config."""
    check_place(config)
    if problems := list(launcher_of(config).problems()):
        raise UserError("\n".join(problems))


def check_hosts(config: RunConfig) -> None:
    """Raise UserError where the hosts of a resolved config cannot be given a preparation."""
    check_place(config)
    if problems := list(launcher_of(config).problems_with_hosts()):
        raise UserError("\n".join(problems))


def check_place(config: RunConfig) -> None:
    """Raise UserError where a run's directory cannot be made."""
    if problems := _run_dir_problems(Path(str(config.run_dir))):
        raise UserError("\n".join(problems))


def check_machine(config: RunConfig, machine: Machine) -> None:
    """Raise UserError where this machine cannot train a run that has its directory and data."""
    if problems := _machine_problems(config, machine):
        raise UserError("\n".join(problems))


def _machine_problems(config: RunConfig, machine: Machine) -> list[str]:
    problems = [
        *launcher_of(config).problems(),
        *_missing_packages(config),
        *own_parts.problems(config),
    ]
    if not config.launcher.is_job:
        launcher = config.launcher
        problems = [
            *lacking(
                launcher.device,
                launcher.ranks_per_node,
                config.precision,
                machine,
                launcher.gpu_ids,
            ),
            *memory.problems(config, machine),
            *problems,
            *engine_of(config).machine_problems(),
            *_missing_build_tools(config),
        ]
    # Of a job's nodes, what GPUs, disks and compilers they have, the ranks find out.
    return [*problems, *_tracking_problems(config, machine), *_push_problems(config)]


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


def _of_preparations(config: RunConfig) -> Iterator[str]:
    """Yield a message for what only `shardwright prepare` takes."""
    if (array := getattr(config.launcher, "array", None)) is not None:
        yield (
            f"launcher.array={array} divides what `shardwright prepare` does, and a run has one "
            "job; leave it out"
        )


def _missing_directories(config: RunConfig) -> Iterator[str]:
    """Yield a message for each name of a path or a module that leads nowhere."""
    for section, given in (("model", config.model), ("tokenizer", config.tokenizer)):
        if isinstance(given, PretrainedTokenizer) and rank_file.is_rank_file(given):
            yield from rank_file.problems(given)
        elif isinstance(given, NamedModel | PretrainedTokenizer):
            yield from not_a_directory(f"{section}.name", given.name, f"the {section}")
    yield from user_modules.not_found(config.model.imports)
    if config.model.kind == "pretrained" and (why := unusable_checkpoint(config.model.name)):
        yield why
    yield from source_of(config.data).misplaced()


def _missing_packages(config: RunConfig) -> list[str]:
    return [
        not_installed(setting, package)
        for setting, package in packages.needed(config).items()
        if importlib.util.find_spec(package) is None
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
    if config.trainer.compile is True and config.launcher.device == "cpu" and not has_compiler:
        yield (
            "trainer.compile=true compiles on a CPU by a C++ compiler (c++ or g++), and there is "
            "none; install one, or set trainer.compile=false"
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


def _push_problems(config: RunConfig) -> list[str]:
    if config.checkpoint.push_to is None:
        return []
    has_token = requirements.has_token()
    return list(requirements.problems(config.checkpoint, os.environ, has_token=has_token))


def _tracking_problems(config: RunConfig, machine: Machine) -> list[str]:
    tracking = config.tracking
    needed = tracking.packages(os.environ)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        names = [needed[name] for name in missing]
        what = "package" if len(names) == 1 else "packages"
        verb = "is" if len(names) == 1 else "are"
        return [
            f"tracking={tracking.kind} needs the {what} {' and '.join(names)}, which {verb} not "
            f"installed; `pip install {' '.join(names)}`"
        ]
    return tracking.problems(os.environ, has_key=machine.has_wandb_key)
