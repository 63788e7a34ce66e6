"""Hand runs over to SLURM: a directory and a script for each job, and what its user is told."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shardwright.launchers import messages
from shardwright.launchers.machine import directories
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.slurm import jobs as slurm
from shardwright.launchers.slurm import script
from shardwright.launchers.slurm.environment import job_environment
from shardwright.launchers.slurm.script import Array
from shardwright.train import program
from shardwright.train.config import RunConfig, SlurmLauncher
from shardwright.train.console import terminal
from shardwright.train.durable import write_text
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.run_directory import stop_note
from shardwright.train.run_directory.choice import Choice
from shardwright.train.run_directory.names import LOGS, job_log

NAME = "SLURM"
SITE = script.TEMPLATE.with_name(script.SITE)
"""The cluster's own settings, which users make out of site.example.sh."""
POLL_SECONDS = 2.0
UNANSWERED = 150
"""So often in a row `wait` may get no answer: a controller may be restarted meanwhile."""


def array_of(configs: Sequence[RunConfig]) -> Array | None:
    """Return the job array that a sweep's runs are: alike for SLURM, in directories 0, 1, ... Pure.

    None where each run is a job of its own.
    """
    run_dirs = [Path(str(config.run_dir)) for config in configs]
    parent = run_dirs[0].parent
    alike = all(config.launcher == configs[0].launcher for config in configs)
    if len(configs) == 1 or not alike:
        return None
    if run_dirs != [parent / str(number) for number in range(len(configs))]:
        return None
    return Array(parent, len(configs))


def new_runs(
    configs: Sequence[RunConfig],
    choices: Sequence[Mapping[str, str]],
    here: Machine,
    *,
    is_generated: bool = False,
    chosen: Sequence[Choice | None] = (),
) -> int:
    """Create the directories of runs and submit them; return the exit code.

    ``chosen`` is what a plan has chosen for each. A directory's name that ``is_generated`` is
    another one where that is taken. Raises UserError, and leaves nothing, where SLURM refuses.
    """
    terminal.outlive()
    array, plans = array_of(configs), chosen or [None] * len(configs)
    if array is None and len(configs) > 1:
        return _each_by_itself(configs, choices, here, plans)
    made: list[list[Path]] = []
    if array is None:
        config, own = directories.create_named(
            configs[0], is_generated=is_generated, chosen=plans[0]
        )
        configs, made = [config], [own]
    home = script.job_directory(configs[0], array)
    try:
        for config, planned in list(zip(configs, plans, strict=True))[len(made) :]:
            made.append(directories.create(config, Path(str(config.run_dir)), chosen=planned))
        job = _submit(configs[0], home, array)
    except BaseException:
        for name in (script.NAME, script.SITE):
            (home / name).unlink(missing_ok=True)
        for own in reversed(made):
            directories.take_back(own)
        raise
    run_dirs = [Path(str(config.run_dir)) for config in configs]
    jobs = [job] if array is None else [f"{job}_{number}" for number in range(array.tasks)]
    for run_dir, each in zip(run_dirs, jobs, strict=True):
        slurm.note(run_dir, each)
    environment = job_environment(configs[0], os.environ)
    width = messages.terminal_width()
    print(messages.header(configs[0], choices[0], here, environment, width))
    print(_submitted(home, job, array), flush=True)
    return _end_of_all(configs[0], dict(zip(jobs, run_dirs, strict=True)))


def _each_by_itself(
    configs: Sequence[RunConfig],
    choices: Sequence[Mapping[str, str]],
    here: Machine,
    plans: Sequence[Choice | None],
) -> int:
    """Submit every run, whatever comes of the others; return the first exit code that is not 0."""
    worst = 0
    for config, own, planned in zip(configs, choices, plans, strict=True):
        try:
            code = new_runs([config], [own], here, chosen=[planned])
        except UserError as error:
            text = f"{config.run_dir} was not submitted: {error}"
            print(messages.error_text(text), file=sys.stderr)
            code = BAD_INPUT
        worst = worst or code
    return worst


def again(config: RunConfig, choices: Mapping[str, str], here: Machine) -> int:
    """Submit a run that has its directory already; return the exit code."""
    terminal.outlive()
    run_dir = Path(str(config.run_dir))
    slurm_job = _submit(config, run_dir, None)
    slurm.note(run_dir, slurm_job)
    environment = job_environment(config, os.environ)
    print(messages.header(config, choices, here, environment, messages.terminal_width()))
    print(_submitted(run_dir, slurm_job, None), flush=True)
    return _end_of_all(config, {slurm_job: run_dir})


def waited(config: RunConfig) -> int:
    """Submit what lies in a directory already, and wait; return its exit code.

    The job is cancelled where this command is told to end.
    """
    run_dir = Path(str(config.run_dir))
    with _told_to_end_by_an_interrupt():
        job = _submit(config, run_dir, None)
        slurm.note(run_dir, job)
        print(f"job {job}: submitted; its log is {run_dir / LOGS / job_log(job)}", flush=True)
        try:
            return wait(job, run_dir)
        except BaseException:
            with contextlib.suppress(UserError):
                slurm.cancel(slurm.Job(job, "RUNNING"))
            raise


@contextlib.contextmanager
def _told_to_end_by_an_interrupt() -> Iterator[None]:
    """Have SIGTERM, within the block, do what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_no_job(run_dir: Path) -> None:
    """Raise UserError where the job of a run is not over yet: two would train in one directory."""
    known = slurm.job_of(run_dir)
    try:
        job = slurm.look(known) if known is not None else None
    except UserError as error:
        raise UserError(
            f"{error}\nso it may be training in {run_dir}; if you know that it is over, remove "
            f"{run_dir / slurm.NOTE}"
        ) from None
    if job is not None and not job.is_over:
        raise UserError(
            f"job {job.id} of {run_dir} is {job.state}, and two cannot train in one directory; "
            f"wait for it, or end it with `{program.command('cancel', str(run_dir))}`"
        )


def show(configs: Sequence[RunConfig]) -> str:
    """Return the job scripts and the commands that would submit them, as `--dry-run` prints."""
    array = array_of(configs)
    if array is None and len(configs) > 1:
        return "\n\n".join(show([config]) for config in configs)
    home = script.job_directory(configs[0], array)
    command = shlex.join(script.submit_command(home))
    return f"# {home / script.NAME}\n{_script(configs[0], array)}\n# command\n{command}"


def _script(config: RunConfig, array: Array | None) -> str:
    return script.job_script(
        config,
        job_environment(config, os.environ),
        directory=Path.cwd(),
        has_site=site_of(config) is not None,
        array=array,
    )


def site_of(config: RunConfig) -> Path | None:
    """Return the cluster's own settings, None where there are none."""
    assert isinstance(config.launcher, SlurmLauncher)
    if config.launcher.site is not None:
        return Path(config.launcher.site)
    return SITE if SITE.exists() else None


def _submit(config: RunConfig, home: Path, array: Array | None) -> str:
    write_text(home / script.NAME, _script(config, array))
    if site := site_of(config):
        shutil.copyfile(site, home / script.SITE)
    return slurm.submit(script.submit_command(home), Path.cwd())


def _submitted(home: Path, job: str, array: Array | None) -> str:
    log = (
        home / LOGS / job_log(job) if array is None else f"{home}/<n>/{LOGS}/{job_log(job, '<n>')}"
    )
    one = home if array is None else home / "0"
    rows = {
        "job": job if array is None else f"{job}, an array of {array.tasks}",
        "log": str(log),
        "follow": program.command("logs", str(one), "--follow"),
        "state": program.command("status", str(home)),
        "stop": program.command("cancel", str(home)),
        "checks": "of GPUs, disks and compilers are left to the nodes",
    }
    return "\n".join(f"  {name:<10}{text}" for name, text in rows.items())


def _end_of_all(config: RunConfig, run_dirs: Mapping[str, Path]) -> int:
    """Wait for the jobs if asked to; return the first exit code that is not 0."""
    assert isinstance(config.launcher, SlurmLauncher)
    if not config.launcher.wait:
        return 0
    worst, left = 0, list(run_dirs)
    for job, run_dir in run_dirs.items():
        try:
            code = wait(job, run_dir)
        except KeyboardInterrupt:
            for other in left:
                print(f"\njob {other} continues without this command", file=sys.stderr)
            raise
        left.remove(job)
        worst = worst or code
    return worst


def wait(job: str, run_dir: Path) -> int:
    """Wait until a job is over, telling of each change; return its exit code."""
    told, unanswered = "", 0
    while True:
        try:
            found = slurm.look(job)
            problem = "SLURM no longer knows it"
        except UserError as error:
            found, problem = None, str(error)
        if found is None:
            unanswered += 1
            if unanswered > UNANSWERED:
                print(f"job {job}: {problem}; see {run_dir / LOGS}", file=sys.stderr)
                return FAILED
        else:
            unanswered = 0
            text = found.state + (f" on {found.nodes}" if found.nodes else "")
            if text != told:
                print(f"job {job}: {text}", flush=True)
                told = text
            if found.is_over:
                return slurm.exit_code(found, stop_note.read(run_dir) is not None)
        time.sleep(POLL_SECONDS)
