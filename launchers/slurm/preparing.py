"""Have SLURM prepare data: an array makes parts of a corpus, and a job behind it joins them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from shardwright.launchers.machine import directories
from shardwright.launchers.slurm import jobs as slurm
from shardwright.launchers.slurm import script, submit
from shardwright.launchers.slurm.environment import job_environment
from shardwright.train.config import RunConfig, SlurmLauncher
from shardwright.train.console import terminal
from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import LOGS, PREPARE_SCRIPT, job_log

TEMPLATE = script.TEMPLATE.with_name(PREPARE_SCRIPT)


def handed_over(config: RunConfig, *, is_generated: bool) -> int:
    """Create the directory of a preparation and submit its jobs; return the exit code.

    Raises UserError, and leaves nothing, where SLURM refuses.
    """
    terminal.outlive()
    config, made = directories.create_named(config, is_generated=is_generated)
    home = Path(str(config.run_dir))
    launcher = config.launcher
    assert isinstance(launcher, SlurmLauncher)
    array = None
    try:
        write_text(home / PREPARE_SCRIPT, job_script(config, job_environment(config, os.environ)))
        if site := submit.site_of(config):
            shutil.copyfile(site, home / script.SITE)
        if launcher.array is not None:
            array = slurm.submit(array_command(home, launcher), Path.cwd())
        job = slurm.submit(join_command(home, array), Path.cwd())
    except BaseException:
        if array is not None:
            slurm.cancel(slurm.Job(array, state="PENDING"))
        directories.take_back(made)
        raise
    slurm.note(home, job)
    print(described(home, job, array, launcher), flush=True)
    return submit.wait(job, home) if launcher.wait else 0


def job_script(config: RunConfig, environment: Mapping[str, str]) -> str:
    """Return the script of all jobs of a preparation: without GPUs, on one node each."""
    launcher = config.launcher
    assert isinstance(launcher, SlurmLauncher)
    without = {"nodes": 1, "nproc_per_node": 1, "gpus_per_node": 0, "gpu_type": None}
    return script.job_script(
        config.model_copy(update={"launcher": launcher.model_copy(update=without)}),
        environment,
        directory=Path.cwd(),
        has_site=submit.site_of(config) is not None,
        template=TEMPLATE.read_text(encoding="utf-8"),
    )


def array_command(home: Path, launcher: SlurmLauncher) -> list[str]:
    """Return the argv that submits the parts. Pure."""
    assert launcher.array is not None
    tasks = script.tasks(launcher.array, launcher.array_limit)
    log = f"{LOGS}/{job_log('%A', '%a')}"
    return _command(home, f"--array={tasks}", f"--output={log}")


def join_command(home: Path, array: str | None) -> list[str]:
    """Return the argv that submits what joins them, once they have ended in whatever way. Pure."""
    return _command(home, *([] if array is None else [f"--dependency=afterany:{array}"]))


def _command(home: Path, *arguments: str) -> list[str]:
    return ["sbatch", "--parsable", f"--chdir={home}", *arguments, str(home / PREPARE_SCRIPT)]


def described(home: Path, job: str, array: str | None, launcher: SlurmLauncher) -> str:
    """Return what its user is told of a preparation that was submitted. Pure."""
    jobs = job if array is None else f"{job}, behind {array}, an array of {launcher.array}"
    rows = {
        "job": jobs,
        "logs": f"{home / LOGS}/job-*.log",
        "state": f"squeue --jobs={job if array is None else f'{array},{job}'}",
        "stop": f"scancel {job if array is None else f'{array} {job}'}",
        "killed": "whatever ends, the same command makes what is missing",
    }
    return "\n".join(f"  {name:<10}{text}" for name, text in rows.items())


def show(config: RunConfig) -> str:
    """Return the script and the commands that would submit it, as `--dry-run` prints them."""
    home = Path(str(config.run_dir))
    launcher = config.launcher
    assert isinstance(launcher, SlurmLauncher)
    array = [] if launcher.array is None else [array_command(home, launcher)]
    commands = [*array, join_command(home, "ARRAY" if array else None)]
    text = job_script(config, job_environment(config, os.environ))
    lines = "\n".join(" ".join(command) for command in commands)
    return f"# {home / PREPARE_SCRIPT}\n{text}\n# commands\n{lines}"
