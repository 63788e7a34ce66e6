"""The end of a job's script: report the outcome, and whether the job is to start again."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers import messages, requeue, resumes
from shardwright.launchers.slurm import jobs as slurm
from shardwright.train import config as run_config
from shardwright.train import program
from shardwright.train.config import SlurmLauncher
from shardwright.train.console import terminal
from shardwright.train.errors import BAD_INPUT, FAILED, RESUMABLE, UserError
from shardwright.train.run_directory import evaluations, stop_note
from shardwright.train.run_directory.failures import rank_failures

CONTINUE = 76
"""What the job script takes for "back into the queue"."""


def main(arguments: Sequence[str]) -> int:
    """Take RUN_DIR, the exit code of the steps, and the signals that the job's shell got."""
    terminal.outlive()
    run_dir, code, signals = Path(arguments[0]), int(arguments[1]), arguments[2:]
    try:
        config = run_config.load(run_dir)
    except UserError as error:
        print(messages.error_text(str(error)))
        return BAD_INPUT
    launcher = config.launcher
    assert isinstance(launcher, SlurmLauncher)
    if evaluations.asked(run_dir) is not None:
        return _end_of_evaluation(run_dir, code)
    stopped = stop_note.read(run_dir)
    failures = rank_failures(run_dir)
    if stopped is None and code == 0:
        print(messages.finish(run_dir))
        return 0
    hang = messages.hang_of(failures)
    if stopped is None and hang is None and (failures or not (signals or code == RESUMABLE)):
        child_code = 128 - code if code > 128 else code  # srun's word for a signal, and Python's
        print(messages.failure(child_code, failures, run_dir, None, config=config))
        outcome = messages.exit_code(child_code, failures, None)
        if outcome == BAD_INPUT and resumes.take_back_unstarted(run_dir):
            print(resumes.TAKEN_BACK)
        return outcome

    if hang is not None:
        print(messages.failure(code, failures, run_dir, None, config=config))
    else:
        print(f"\n{stopped}" if stopped else f"\nstopped by {' '.join(signals) or 'a signal'}")
    ended = "TERM" in signals and not (signals[0] == "USR1" and _is_past_its_limit())
    reason = why_not_continued(launcher, is_ended=ended, is_cancelled=slurm.is_cancelled(run_dir))
    if reason is None:
        limits = ["--restarts", os.environ.get("SLURM_RESTART_COUNT", "0")]
        limits += ["--limit", str(launcher.max_requeues)]
        if requeue.main([str(run_dir), *limits]) == 0:
            return CONTINUE
    else:
        print(reason)
    print(f"resume with: {program.command('resume', str(run_dir))}")
    return RESUMABLE


def _end_of_evaluation(run_dir: Path, code: int) -> int:
    """Say how ranks ended that have only evaluated; return the job's exit code.

    Nothing is resumed, and who waits for the job reads what they have left.
    """
    if evaluations.outcome(run_dir) is not None:
        return 0
    failures = rank_failures(run_dir)
    child_code = 128 - code if code > 128 else code
    if failures:
        print(messages.failure(child_code, failures, run_dir, None))
    return messages.exit_code(child_code, failures, None) or FAILED


def why_not_continued(launcher: SlurmLauncher, *, is_ended: bool, is_cancelled: bool) -> str | None:
    """Return why a job that has stopped does not ask to be continued, or None where it does. Pure.

    ``is_ended`` by SLURM, which requeues a job itself where it preempts it without a grace time; a
    job that its user cancels would come back to life.
    """
    if is_cancelled:
        return "it was cancelled"
    if is_ended:
        return "SLURM ends this job, and requeues it by itself if it was preempted"
    if not launcher.requeue:
        return "launcher.requeue=false keeps it out of the queue"
    return None


def _is_past_its_limit() -> bool:
    """Return whether this job ends because its time is up; SLURM says COMPLETING whatever it is."""
    job = slurm.look(os.environ["SLURM_JOB_ID"])
    return job is not None and job.is_past_its_limit


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
