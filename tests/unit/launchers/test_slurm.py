"""What SLURM says of a job, what becomes of its exit code, and when a job asks to go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shardwright.launchers.job_end import why_not_continued
from shardwright.launchers.slurm import jobs as slurm
from shardwright.launchers.slurm.jobs import Job, exit_code, parsed
from shardwright.train.config import SlurmLauncher
from tests.unit.launchers.configs import slurm_run
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

TINY = ("launcher=slurm", "run_dir=run", "model=gpt2_tiny", "data.sequence_length=64")

# Of `scontrol show job --oneliner`, SLURM 22.05, shortened; in a directory named to deceive.
RECORD = (
    "JobId=7 JobName=run UserId=me(1000) Priority=42 JobState={state} Reason=NodeDown "
    "Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode={code} "
    "RunTime=1-00:01:05 TimeLimit=1-00:01:00 TimeMin=N/A NodeList=node[1-2] BatchHost=node1 "
    "WorkDir=/runs/JobState=COMPLETED Restarts=9 StdErr=/dev/null\n"
)


def test_a_record_is_read_up_to_the_first_value_that_a_user_chooses() -> None:
    job = parsed(RECORD.format(state="RUNNING", code="0:0"), "7")
    assert job == Job(
        *("7", "RUNNING", "NodeDown"),
        exit_code=0,
        restarts=2,
        nodes="node[1-2]",
        run_seconds=86465,
        limit_seconds=86460,
    )
    assert job.is_past_its_limit
    assert not job.is_over
    assert parsed("", "7") is None


@pytest.mark.parametrize(
    ("state", "code", "is_stopped", "expected"),
    [
        ("COMPLETED", "0:0", False, 0),
        ("FAILED", "1:0", False, 1),
        ("FAILED", "2:0", False, 2),
        ("FAILED", "75:0", True, 75),
        ("FAILED", "0:9", False, 137),
        ("CANCELLED", "0:15", True, 75),
        ("TIMEOUT", "0:0", False, 1),
        ("NODE_FAIL", "0:0", False, 1),
    ],
)
def test_exit_code_of_a_run(state: str, code: str, is_stopped: bool, expected: int) -> None:
    job = parsed(RECORD.format(state=state, code=code), "7")
    assert job is not None
    assert job.is_over
    assert exit_code(job, is_stopped) == expected


def test_a_stopped_job_asks_to_go_on_unless_it_is_to_end() -> None:
    launcher, once = slurm_run().launcher, slurm_run(requeue=False).launcher
    assert isinstance(launcher, SlurmLauncher)
    assert isinstance(once, SlurmLauncher)
    assert why_not_continued(launcher, is_ended=False, is_cancelled=False) is None
    assert why_not_continued(launcher, is_ended=False, is_cancelled=True) == "it was cancelled"
    assert "SLURM ends this job" in str(
        why_not_continued(launcher, is_ended=True, is_cancelled=False)
    )
    assert "launcher.requeue=false" in str(
        why_not_continued(once, is_ended=False, is_cancelled=False)
    )


def test_a_note_names_the_last_job_of_a_run(tmp_path: Path) -> None:
    assert slurm.job_of(tmp_path) is None
    slurm.note(tmp_path, "12_3")
    slurm.note_cancelled(tmp_path)
    slurm.note(tmp_path, "13_3")
    assert slurm.job_of(tmp_path) == "13_3"
    assert not slurm.is_cancelled(tmp_path), "a new job is not the one that was cancelled"


# --- the command line without a cluster -----------------------------------------------------------


def test_dry_run_prints_the_script_and_how_it_would_be_submitted(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    outcome = shardwright("train", "--dry-run", *TINY, "launcher.nodes=2")
    assert outcome.code == 0
    assert "\n#SBATCH --nodes=2\n" in outcome.out
    assert f"\n# command\nsbatch --parsable --chdir={tmp_path}/run {tmp_path}/run/job.sbatch" in (
        outcome.out
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="the message is that of a real sbatch")
def test_without_a_cluster_sbatch_itself_says_so(shardwright: Shardwright, tmp_path: Path) -> None:
    outcome = shardwright("train", *TINY)
    assert outcome.code == 2
    assert "SLURM refused the job:" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_slurm_is_told_where_to_submit(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    outcome = shardwright("train", *TINY)
    assert outcome.code == 2
    assert "launcher=slurm needs sbatch, which this machine does not have" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run_dir=a%j",), "holds % or a backslash, which SLURM replaces in the path of a job's"),
        (("launcher.site=nowhere.sh",), "nowhere.sh cannot be read; copy slurm/site.example.sh"),
        (("launcher.array=3",), "launcher.array=3 divides what `shardwright prepare` does"),
    ],
)
def test_what_cannot_be_submitted(
    shardwright: Shardwright, arguments: tuple[str, ...], message: str
) -> None:
    outcome = shardwright("train", *TINY, *arguments)
    assert outcome.code == 2
    assert message in outcome.err.replace("\n       ", " ")


def test_a_sweep_over_launchers_is_refused(shardwright: Shardwright) -> None:
    outcome = shardwright("train", "-m", "launcher=slurm,torchrun", "sweep_dir=s", *TINY[2:])
    assert outcome.code == 2
    assert "launcher=slurm,torchrun: the runs of a sweep start here or by SLURM, not both" in (
        outcome.err.replace("\n       ", " ")
    )
