"""Points as tasks of a SLURM job array, this many of them running at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardwright.launchers import launch, resumes, runs
from shardwright.launchers.machine import directories
from shardwright.launchers.slurm import jobs as slurm
from shardwright.launchers.slurm import script, submit
from shardwright.launchers.slurm.environment import job_environment
from shardwright.launchers.slurm.script import Array
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.places import Outcome, Task
from shardwright.train import config as run_config
from shardwright.train import program
from shardwright.train.checkpoint import retention
from shardwright.train.config import RunConfig
from shardwright.train.durable import write_text
from shardwright.train.errors import FAILED, RESUMABLE, UserError
from shardwright.train.run_directory import stop_note
from shardwright.train.run_directory.names import CHECKPOINTS
from shardwright.train.units import counted


@dataclass
class Jobs:
    """Each point is a task of an array, which goes on without this command."""

    directory: Path
    config: SweepConfig
    cwd: Path
    say: Callable[[str], object]
    waits: bool
    """Whether the sweep stays until all are over: a search has to learn of each."""
    _jobs: dict[int, str] = field(default_factory=dict)
    """The job of each point that may still run."""

    outlives = True

    @property
    def stays(self) -> bool:
        return self.waits

    def described(self) -> str:
        limit = self.config.max_parallel
        many = (
            "as many at a time as the cluster has room for"
            if limit == "auto"
            else (f"{limit} at a time")
        )
        return f"as tasks of a job array, {many}"

    def how_to_stop(self) -> str:
        stop = program.command("cancel", str(self.directory))
        return f"{stop}: points save; their jobs go on without this command"

    def room(self) -> int:
        """All at once: what runs when is the queue's affair, unless a search decides on it."""
        if self.config.search.kind == "none" or self.config.max_parallel == "auto":
            return len(self._jobs) + 2**16
        return self.config.max_parallel - len(self._jobs)

    def take_over(self, numbers: Iterable[int]) -> set[int]:
        # A kill may come between a submission and the notes of it.
        queued = {
            int(job.partition("_")[2]): job
            for job, where in slurm.working_directories().items()
            if where == self.directory and job.partition("_")[2].isdecimal()
        }
        for number in numbers:
            if job := queued.get(number) or slurm.job_of(self._run_dir(number)):
                self._jobs[number] = job
                slurm.note(self._run_dir(number), job)
        return set(self._jobs)

    def start(self, tasks: Sequence[Task]) -> list[str]:
        for group in alike(tasks):
            self._submit(group)
        return [f"job {self._jobs[task.point.number]}" for task in tasks]

    def ended(self, timeout_seconds: float) -> list[Outcome]:
        deadline = time.monotonic() + timeout_seconds
        while True:
            queued = slurm.working_directories() if self._jobs else {}
            found = [
                Outcome(number, code)
                for number, job in self._jobs.items()
                if job not in queued and (code := self._code(number, job)) is not None
            ]
            for outcome in found:
                del self._jobs[outcome.number]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(submit.POLL_SECONDS)

    def stop(self, numbers: Iterable[int], *, at_once: bool = False) -> None:
        """Have points end for good; their jobs do not go back into the queue."""
        for number in numbers:
            job = slurm.look(self._jobs[number])
            if job is None or job.is_over:
                continue
            slurm.note_cancelled(self._run_dir(number))
            if at_once:
                slurm.cancel(job)
            else:
                slurm.stop(job)

    def close(self) -> None:
        """Jobs go on."""

    def shown(self, tasks: Sequence[Task]) -> str:
        """Return the scripts that would be submitted, and the commands, as `--dry-run` prints."""
        parts = []
        for group in alike(tasks):
            command = " ".join(script.submit_command(self.directory))
            parts.append(f"# {self.directory / script.NAME}\n{self._script(group)}\n# command")
            parts.append(command)
        return "\n".join(parts)

    # --- one array ------------------------------------------------------------------------------

    def _submit(self, tasks: Sequence[Task]) -> None:
        """Make the run directories of some points and submit them; nothing is left if refused."""
        undo = contextlib.ExitStack()
        try:
            for task in tasks:
                if task.is_resumed:
                    _note_resume(task, undo)
                else:
                    made = directories.create(task.config, task.run_dir)
                    undo.callback(directories.take_back, made)
            write_text(self.directory / script.NAME, self._script(tasks))
            if site := submit.site_of(tasks[0].config):
                shutil.copyfile(site, self.directory / script.SITE)
            job = slurm.submit(script.submit_command(self.directory), self.cwd)
        except BaseException:
            undo.close()
            raise
        for task in tasks:
            number = task.point.number
            self._jobs[number] = f"{job}_{number}"
            slurm.note(task.run_dir, self._jobs[number])
        self.say(f"job {job}: an array of {counted(len(tasks), 'point')}")

    def _script(self, tasks: Sequence[Task]) -> str:
        config = self._limited(tasks[0].config)
        numbers = tuple(sorted(task.point.number for task in tasks))
        return script.job_script(
            config,
            job_environment(config, os.environ),
            directory=self.cwd,
            has_site=submit.site_of(config) is not None,
            array=Array(self.directory, len(numbers), numbers),
        )

    def _limited(self, config: RunConfig) -> RunConfig:
        if self.config.max_parallel == "auto":
            return config
        launcher = config.launcher.model_copy(update={"array_limit": self.config.max_parallel})
        return config.model_copy(update={"launcher": launcher})

    def _run_dir(self, number: int) -> Path:
        return self.directory / str(number)

    def _code(self, number: int, job: str) -> int | None:
        """Return how a job that is not in the queue has ended; None where it is after all."""
        run_dir = self._run_dir(number)
        try:
            found = slurm.look(job)
        except UserError:  # the controller does not answer: it may be restarted meanwhile
            return None
        is_stopped = stop_note.read(run_dir) is not None
        if found is None:
            config = run_config.load(run_dir)
            return 0 if runs.is_done(run_dir, config) else RESUMABLE if is_stopped else FAILED
        return slurm.exit_code(found, is_stopped) if found.is_over else None


def alike(tasks: Sequence[Task]) -> list[list[Task]]:
    """Return the tasks in groups that one array can hold: what SLURM is told is the same. Pure."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        environment = job_environment(task.config, os.environ)
        key = f"{task.config.launcher.model_dump_json()} {sorted(environment.items())}"
        groups.setdefault(key, []).append(task)
    return list(groups.values())


def _note_resume(task: Task, undo: contextlib.ExitStack) -> None:
    """Leave what `shardwright resume` leaves before it submits a run again."""
    submit.check_no_job(task.run_dir)
    with launch.claimed(task.run_dir):
        retention.remove_leftovers(task.run_dir / CHECKPOINTS)
        newest = resumes.check(task.run_dir, task.config)
        number = resumes.write(task.run_dir, task.config, [], newest)
    undo.callback(resumes.take_back, task.run_dir, number)
