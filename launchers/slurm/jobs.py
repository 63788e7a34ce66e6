"""Talk to SLURM's own commands: submit a job, ask for its outcome, signal it, end it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwright.train.durable import write_text
from shardwright.train.errors import FAILED, RESUMABLE, UserError
from shardwright.train.run_directory.names import CANCEL_JSON, SLURM_JSON

NOTE = SLURM_JSON
"""In a run's directory: which job it is."""
CANCELLED = CANCEL_JSON
"""In a run's directory: it was asked to stop for good, and its job is not to requeue itself."""

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING"})
RUNNING = frozenset({"RUNNING", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT"})
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """What SLURM knows of a job."""

    id: str
    """A number, or <array>_<task>."""
    state: str
    """In SLURM's own word: PENDING, RUNNING, COMPLETED, FAILED, ..."""
    reason: str | None = None
    """Why it waits, or ended."""
    exit_code: int = 0
    restarts: int = 0
    nodes: str | None = None
    run_seconds: int = 0
    limit_seconds: int | None = None

    @property
    def is_over(self) -> bool:
        return self.state not in WAITING | RUNNING

    @property
    def is_past_its_limit(self) -> bool:
        return self.limit_seconds is not None and self.run_seconds >= self.limit_seconds


def submit(argv: Sequence[str], cwd: Path) -> str:
    """Run sbatch; return the job's id. Raises UserError with SLURM's own reason."""
    # Within another job, its own numbers would be taken for the new one's.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith("SLURM_")
    }
    try:
        ended = _run(argv, cwd=cwd, environment=environment)
    except FileNotFoundError:
        raise UserError(
            "launcher=slurm needs sbatch, which this machine does not have; submit from a login "
            "node of the cluster, or choose launcher=torchrun"
        ) from None
    if ended.returncode != 0:
        lines = [line.removeprefix("sbatch: ") for line in ended.stderr.splitlines() if line]
        raise UserError("\n".join(["SLURM refused the job:", *(f"  {line}" for line in lines)]))
    return ended.stdout.strip().partition(";")[0]


def look(job: str) -> Job | None:
    """Return what the controller, or else the accounting, knows of a job; None where neither.

    Raises UserError where there is a controller and it does not answer.
    """
    try:
        ended = _run(["scontrol", "show", "job", "--oneliner", job])
    except FileNotFoundError:  # the run is seen from a machine without SLURM
        return None
    if ended.returncode == 0 and (found := parsed(ended.stdout, job)):
        return found
    if ended.returncode != 0 and "Invalid job id" not in ended.stderr:
        raise UserError(f"SLURM has no information about job {job}: {ended.stderr.strip()}")
    for flags in (["-X"], ["-c"]):  # the database, or the file of those that ended
        try:
            ended = _run(["sacct", *flags, "-nP", "-j", job, "-o", "state,exitcode"])
        except FileNotFoundError:
            return None
        line = ended.stdout.partition("\n")[0]
        state, _, code = line.partition("|")
        if ended.returncode == 0 and state:
            return Job(job, state.split()[0], exit_code=int(code.partition(":")[0] or 0))
    return None


def parsed(text: str, job: str) -> Job | None:
    """Return the job that a line of `scontrol show job` describes. Pure.

    A value may hold blanks, so only the first of each name counts; those come before any path.
    """

    def field(name: str) -> str | None:
        found = re.search(rf"(?:^| ){name}=(\S*)", text)
        value = found[1] if found else None
        return None if value in ("", "None", "(null)") else value

    state = field("JobState")
    if state is None:
        return None
    code, _, signal = (field("ExitCode") or "0:0").partition(":")
    return Job(
        job,
        state,
        reason=field("Reason"),
        exit_code=int(code) or (128 + int(signal) if int(signal) else 0),
        restarts=int(field("Restarts") or 0),
        nodes=field("NodeList"),
        run_seconds=_seconds(field("RunTime")) or 0,
        limit_seconds=_seconds(field("TimeLimit")),
    )


def _seconds(text: str | None) -> int | None:
    """Return the seconds of SLURM's [days-]hours:minutes:seconds; None for UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text or "")
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def working_directories() -> dict[str, Path]:
    """Return the directory of each job that this user has in the queue, by its id."""
    try:
        ended = _run(["squeue", "--noheader", "--me", "--array", "--format=%i %Z"])
    except FileNotFoundError:
        return {}
    pairs = (line.split(" ", 1) for line in ended.stdout.splitlines() if " " in line)
    return {job: Path(directory) for job, directory in pairs}


def queued() -> frozenset[str]:
    """Return the ids of all jobs that wait or run, those of arrays as <array>_<task>."""
    try:
        ended = _run(["squeue", "--noheader", "--array", "--format=%i"])
    except FileNotFoundError:
        return frozenset()
    return frozenset(ended.stdout.split())


def stop(job: Job) -> None:
    """Have a running job save and stop; one that still waits is taken out of the queue."""
    if job.state in WAITING:
        cancel(job)
    else:
        # To the batch shell, which sends it on to the ranks and remembers it between its steps.
        _checked(["scancel", "--batch", "--signal=USR1", job.id])


def cancel(job: Job) -> None:
    """End a job: the ranks get SIGTERM, and SIGKILL after the cluster's KillWait."""
    _checked(["scancel", job.id])


# --- what a run knows of its job ------------------------------------------------------------------


def note(run_dir: Path, job: str) -> None:
    """Write down which job a run is from now on."""
    (run_dir / CANCELLED).unlink(missing_ok=True)
    write_text(run_dir / NOTE, json.dumps({"job": job, "submitted_at": time.time()}) + "\n")


def job_of(run_dir: Path) -> str | None:
    """Return the id of the last job of a run; None where it was never submitted."""
    try:
        return str(json.loads((run_dir / NOTE).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_cancelled(run_dir: Path) -> None:
    """Have the job stop for good when its ranks have stopped."""
    write_text(run_dir / CANCELLED, json.dumps({"time": time.time()}) + "\n")


def is_cancelled(run_dir: Path) -> bool:
    return (run_dir / CANCELLED).exists()


def exit_code(job: Job, is_stopped: bool) -> int:
    """Return the exit code of a run whose job is over. Pure."""
    if job.state == "COMPLETED":
        return 0
    if job.state == "FAILED" and job.exit_code:
        return job.exit_code
    return RESUMABLE if is_stopped else FAILED


def _checked(argv: Sequence[str]) -> None:
    ended = _run(argv)
    if ended.returncode != 0:
        raise UserError(f"{argv[0]} failed: {ended.stderr.strip()}")


def _run(
    argv: Sequence[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{argv[0]} has had no answer for {TIMEOUT_SECONDS} s: the cluster's controller may "
            "be down; try again later"
        ) from None
