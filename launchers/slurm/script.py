"""The job script of a run, out of slurm/job.sbatch and its config: pure functions."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwright.launchers.slurm.tasks import RANK_VARIABLES, STARTS
from shardwright.train.config import RunConfig, SlurmLauncher
from shardwright.train.process import inherited
from shardwright.train.run_directory.names import JOB_SCRIPT, LOGS, job_log

TEMPLATE = Path(__file__).resolve().parents[2] / "slurm" / "job.sbatch"
NAME = JOB_SCRIPT
SITE = "site.sh"
"""Under these names script and site settings lie in the directory that the job starts in."""


@dataclass(frozen=True)
class Array:
    """The runs of a sweep as one job array: task i runs in ``directory``/i."""

    directory: Path
    tasks: int
    numbers: tuple[int, ...] | None = None
    """Of the tasks, where they are not all from 0 on."""


def job_script(
    config: RunConfig,
    environment: Mapping[str, str],
    *,
    directory: Path,
    has_site: bool,
    array: Array | None = None,
    python: str = sys.executable,
    template: str | None = None,
) -> str:
    """Return the text of a run's job script, or that of all runs of an array.

    ``directory`` is where the user is. Every value stands in quotes that let the shell change
    nothing in it.
    """
    assert isinstance(config.launcher, SlurmLauncher)
    home = job_directory(config, array)
    quoted_home = shlex.quote(str(home))
    values = {
        "directives": "\n".join(f"#SBATCH {line}" for line in directives(config, array)),
        "run_dir": quoted_home if array is None else f'{quoted_home}/"$SLURM_ARRAY_TASK_ID"',
        "site": shlex.quote(str(home / SITE)) if has_site else "",
        "python": shlex.quote(python),
        "ranks_per_node": str(config.launcher.ranks_per_node),
        "tasks": STARTS[config.launcher.starts]().text(),
        "grace_seconds": f"{config.launcher.grace_seconds:g}",
        "max_requeues": str(config.launcher.max_requeues if config.launcher.requeue else 0),
        "directory": shlex.quote(str(directory)),
        "inherited": " ".join(
            [
                *inherited.RANKS,
                *(f"${{!{p}@}}" for p in inherited.RANKS_OF_TORCHRUN + inherited.RANKS_OF_MPI),
            ]
        ),
        "environment": "\n".join(
            f"export {name}={shlex.quote(value)}" for name, value in environment.items()
        ),
    }
    text = TEMPLATE.read_text(encoding="utf-8") if template is None else template
    # In one pass, so that a value is never searched for the name of another.
    return re.sub(r"@([a-z_]+)@", lambda found: values[found[1]], text)


def job_directory(config: RunConfig, array: Array | None) -> Path:
    """Return the directory that the job starts in, and that its script lies in."""
    assert config.run_dir is not None, "resolved"
    return Path(config.run_dir) if array is None else array.directory


def directives(config: RunConfig, array: Array | None = None) -> list[str]:
    """Return the flags for sbatch, one each.

    They hold no path and no blank: sbatch reads them by rules of its own.
    """
    launcher = config.launcher
    assert isinstance(launcher, SlurmLauncher)
    # Relative to the job's own directory, whose name may hold what no directive may.
    log = f"{LOGS}/{job_log('%j')}" if array is None else f"%a/{LOGS}/{job_log('%A', '%a')}"
    flags: dict[str, object] = {
        "job-name": config.name,
        "nodes": launcher.nodes,
        "ntasks-per-node": launcher.ranks_per_node,
        **_gpus(launcher),
        "cpus-per-task": launcher.cpus_per_rank,
        "mem": "0" if launcher.memory_per_node == "all" else launcher.memory_per_node,
        "time": launcher.time_limit,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "dependency": launcher.dependency,
        "array": tasks(array.numbers or array.tasks, launcher.array_limit) if array else None,
        "mail-user": launcher.mail_user,
        "mail-type": ",".join(launcher.mail_type) or None,
        "output": log,
        "open-mode": "append",
        "signal": f"B:USR1@{math.ceil(launcher.grace_seconds)}",
    }
    return [
        *(f"--{name}={value}" for name, value in flags.items() if value is not None),
        "--requeue" if launcher.requeue else "--no-requeue",
        *(["--exclusive"] if launcher.exclusive else []),
        *launcher.extra_sbatch,
    ]


def _gpus(launcher: SlurmLauncher) -> dict[str, str]:
    if not launcher.gpus_per_node or launcher.gpu_request == "none":
        return {}
    kind = f"{launcher.gpu_type}:" if launcher.gpu_type else ""
    if launcher.gpu_request == "gres":
        return {"gres": f"gpu:{kind}{launcher.gpus_per_node}"}
    return {"gpus-per-node": f"{kind}{launcher.gpus_per_node}"}


def tasks(of: int | Sequence[int], limit: int | None) -> str:
    """Return how sbatch is told of the tasks of an array, this many at once at most. Pure.

    ``of`` is their number, or the number of each.
    """
    numbers = sorted(range(of) if isinstance(of, int) else of)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    listed = ",".join(f"{a}-{b}" if of == len(numbers) or a != b else str(a) for a, b in spans)
    return listed + (f"%{limit}" if limit else "")


# A rank of `srun` without a job script: on the first node it meets the others.
_RANK = f"""
{RANK_VARIABLES}\
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID * 7 % 10000))
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}
inside=()
site=$1
shift
if [ -n "$site" ]; then source "$site"; fi
exec "${{inside[@]}}" "$@"
"""
_OF_JOBS_ONLY = ("--output=", "--open-mode=", "--signal=", "--mail-", "--dependency=", "--requeue")


def waited_command(config: RunConfig, command: Sequence[str], site: Path | None) -> list[str]:
    """Return the argv that runs a command as every rank of a job, and waits for it. Pure."""
    flags = [
        flag for flag in directives(config) if not flag.startswith((*_OF_JOBS_ONLY, "--no-requeue"))
    ]
    return ["srun", *flags, "--label", "bash", "-c", _RANK, "rank", str(site or ""), *command]


def submit_command(home: Path, arguments: Sequence[str] = ()) -> list[str]:
    """Return the argv that submits the script that lies in ``home``."""
    return ["sbatch", "--parsable", f"--chdir={home}", *arguments, str(home / NAME)]
