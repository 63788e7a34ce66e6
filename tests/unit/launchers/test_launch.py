"""A run from the command line to its exit code, with ranks that misbehave on purpose."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardwright.launchers.ranks import child
from shardwright.train.process import signals
from shardwright.train.run_directory import stop_note
from tests.unit.launchers.fakes import ROOT, Checkout, make_checkout

checkout = pytest.fixture(make_checkout)

LOCAL = ("launcher=local", "strategy=single", "launcher.device=cpu")
TWO_RANKS = ("launcher=torchrun", "launcher.nproc_per_node=2", "launcher.device=cpu")


def test_success_tells_where_everything_lies(checkout: Checkout) -> None:
    outcome = checkout.train(*LOCAL, "name=first", "run_dir=my run")
    run_dir = checkout.cwd / "my run"
    assert outcome.code == 0
    assert "gpt2_small, clm" in outcome.out
    assert "256 samples = 8 x 32 x 1 rank(s); 1,000 steps" in outcome.out
    assert str(run_dir / "final") in outcome.out
    assert f"shardwright sample '{run_dir}' --prompt" in outcome.out
    assert (run_dir / "config.yaml").is_file()
    assert outcome.err == ""
    assert os.listdir(checkout.cwd) == ["my run"]


def test_a_train_py_in_the_working_directory_is_not_taken_for_ours(checkout: Checkout) -> None:
    (checkout.cwd / "train.py").write_text("raise SystemExit('not this one')")
    outcome = checkout.train(*LOCAL, "run_dir=run", PYTHONSAFEPATH="1")
    assert (outcome.code, outcome.err) == (0, "")


def test_bad_input_found_in_preparation_leaves_nothing(checkout: Checkout) -> None:
    outcome = checkout.train(*LOCAL, "run_dir=a/b/run", FAKE_PREPARATION="bad-input")
    assert outcome.code == 2
    assert outcome.err == "error: too small for one batch\n"
    assert os.listdir(checkout.cwd) == []


def test_crash_in_preparation_keeps_the_run_directory(checkout: Checkout) -> None:
    outcome = checkout.train(*LOCAL, "run_dir=run", FAKE_PREPARATION="crash")
    assert outcome.code == 1
    assert "preparing the data failed" in outcome.err
    assert (checkout.cwd / "run" / "config.yaml").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_stops_a_preparation_is_told_though_its_work_cannot_know(
    checkout: Checkout, number: signal.Signals
) -> None:
    process = checkout.start(*LOCAL, "run_dir=run", FAKE_PREPARATION="deaf")
    deadline = time.monotonic() + 60
    while not (checkout.cwd / "preparing").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    where = stop_note.read(checkout.cwd / "run")
    assert process.returncode == 75
    assert f"stopped by {signals.by_whom(number)} while the data were being prepared" in err
    assert where is not None
    assert str(where) == f"stopped while preparing data by {child.asked_by(number)}"


def test_a_key_pressed_before_anything_is_prepared_leaves_nothing(checkout: Checkout) -> None:
    (checkout.root / "launchers" / "messages.py").write_text(
        (ROOT / "launchers" / "messages.py").read_text()
        + "\n\ndef header(*arguments):\n    raise KeyboardInterrupt\n"
    )
    outcome = checkout.train(*LOCAL, "run_dir=run")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "")
    assert os.listdir(checkout.cwd) == []


def test_a_key_pressed_between_the_data_and_the_ranks_is_told(checkout: Checkout) -> None:
    (checkout.root / "launchers" / "kinds" / "local.py").write_text(
        (ROOT / "launchers" / "kinds" / "local.py").read_text()
        + "\n    def files(self, *arguments):\n        raise KeyboardInterrupt\n"
    )
    outcome = checkout.train(*LOCAL, "run_dir=run")
    where = stop_note.read(checkout.cwd / "run")
    assert outcome.code == 75
    assert "stopped by Ctrl-C while the data were being prepared" in outcome.err
    assert where is not None
    assert str(where) == "stopped while preparing data by Ctrl-C"


CTRL_C_BEFORE_THE_CHILD = """
import signal, sys
from shardwright.launchers.ranks import child

below = child.descendants

def pressed(pid):  # what takes time before the child is there
    child.descendants = below
    signal.raise_signal(signal.SIGINT)
    return below(pid)

child.descendants = pressed
ended = child.run([sys.executable, "-c", ""], {}, at_ctrl_c="stopping")
assert ended.stopped_by == signal.SIGINT, ended
"""


def test_a_ctrl_c_just_before_the_child_is_passed_on() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CTRL_C_BEFORE_THE_CHILD]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in process.stderr
    assert process.returncode == 0
    assert "stopping; Ctrl-C again kills" in process.stderr


CTRL_C_BEFORE_EXEC = """
import os, signal, sys
from shardwright.launchers.ranks import child

# As a terminal does whose foreground process group the child is still a member of.
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))
ended = child.run([sys.executable, "-c", "print('worked')"], {}, at_ctrl_c="stopping")
assert ended == child.Ended(0, None), ended
"""


def test_a_ctrl_c_before_the_child_has_its_own_session_is_told_once() -> None:
    """The launcher gets it too, and it is the one that tells of it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CTRL_C_BEFORE_EXEC]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "worked\n", "")


def test_failed_rank_is_named_with_the_end_of_its_traceback(checkout: Checkout) -> None:
    outcome = checkout.train(*LOCAL, "run_dir=run", FAKE_RANK="fail-first")
    assert outcome.code == 1
    assert "rank 0 on node-7 failed first" in outcome.err
    assert "line 19" in outcome.err
    assert "line 11" not in outcome.err
    assert str(checkout.cwd / "run" / "logs" / "rank-0.log") in outcome.err


@pytest.mark.parametrize(
    ("behaviour", "code", "text"),
    [
        ("bad-input", 2, "error: data.paths: nothing in there"),
        (
            "resumable",
            75,
            "stopped at step 7 by SIGUSR1 on rank 1; resume with: shardwright resume",
        ),
        ("killed", 1, "was killed by SIGKILL without a report"),
    ],
)
def test_exit_code_of_one_rank(checkout: Checkout, behaviour: str, code: int, text: str) -> None:
    outcome = checkout.train(*LOCAL, "run_dir=run", FAKE_RANK=behaviour)
    assert outcome.code == code
    assert text in outcome.err


def test_torchrun_runs_hostile_run_directories(checkout: Checkout) -> None:
    name = "a 'b' \"c\" $(touch pwned) $$ ${local_rank}\n;d"
    override = "run_dir='" + name.replace("'", "\\'").replace("${", "\\${") + "'"
    outcome = checkout.train(*TWO_RANKS, override)
    assert (outcome.code, outcome.err) == (0, "")
    assert os.listdir(checkout.cwd) == [name]
    logs = sorted(path.name for path in (checkout.cwd / name / "logs").glob("rank-*"))
    assert logs == ["rank-0.log", "rank-1.log"]


def test_first_failing_rank_is_named_last_and_torchrun_stays_quiet(checkout: Checkout) -> None:
    outcome = checkout.train(*TWO_RANKS, "run_dir=run", FAKE_RANK="fail-later,fail-first")
    assert outcome.code == 1
    assert outcome.err.startswith("rank 1 on node-7 failed first:")
    assert "ranks that failed after it: 0" in outcome.err
    assert "ChildFailedError" in (checkout.cwd / "run" / "logs" / "torchrun.log").read_text()


def test_exit_code_survives_torchrun(checkout: Checkout) -> None:
    outcome = checkout.train(*TWO_RANKS, "run_dir=run", FAKE_RANK="resumable")
    assert outcome.code == 75


def test_rank_that_crashes_before_it_can_report_is_shown_all_the_same(checkout: Checkout) -> None:
    outcome = checkout.train(*TWO_RANKS, "run_dir=run", FAKE_RANK="crash-early,hang")
    assert outcome.code == 1
    assert "rank 0 ended with exit code 1 without a report" in outcome.err
    assert "No module named 'no_such_module'" in outcome.err


def test_killed_rank_is_named_with_its_signal(checkout: Checkout) -> None:
    outcome = checkout.train(*TWO_RANKS, "run_dir=run", FAKE_RANK="hang,killed")
    assert outcome.code == 1
    assert "rank 1 was killed by SIGKILL without a report" in outcome.err
    assert_all_gone(pids_of(checkout.cwd / "run", ranks=1))


@pytest.mark.parametrize("launcher", [LOCAL, TWO_RANKS], ids=["local", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_leaves_no_process(
    checkout: Checkout, launcher: tuple[str, ...], number: signal.Signals
) -> None:
    brief = "launcher.grace_seconds=2"
    process = checkout.start(*launcher, brief, "run_dir=run", FAKE_RANK="hang,hang")
    pids = pids_of(checkout.cwd / "run", ranks=1 if launcher is LOCAL else 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {signals.by_whom(number)}" in err
    assert_all_gone(pids)


def test_ranks_end_when_torchrun_is_killed(checkout: Checkout) -> None:
    process = checkout.start(*TWO_RANKS, "run_dir=run", FAKE_RANK="hang,hang")
    pids = pids_of(checkout.cwd / "run", ranks=2)
    torchrun = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(torchrun, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was killed by SIGKILL" in err
    assert_all_gone(pids)


def test_ranks_end_when_the_launcher_is_killed(checkout: Checkout) -> None:
    process = checkout.start(*TWO_RANKS, "run_dir=run", FAKE_RANK="hang,hang")
    ranks = pids_of(checkout.cwd / "run", ranks=2)[::2]
    process.kill()
    process.wait()
    assert_all_gone(ranks)
    # What a rank started itself is beyond reach once nothing is left to look for it.
    for pid in pids_of(checkout.cwd / "run", ranks=2)[1::2]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_multirun_gives_each_job_its_own_run_directory(checkout: Checkout) -> None:
    outcome = checkout.train(*LOCAL, "-m", "seed=3,4", "sweep_dir=sweep")
    assert outcome.code == 0
    assert "seed: 3" in (checkout.cwd / "sweep" / "0" / "config.yaml").read_text()
    assert "seed: 4" in (checkout.cwd / "sweep" / "1" / "config.yaml").read_text()
    assert os.listdir(checkout.cwd) == ["sweep"]


def test_multirun_without_sweep_dir_makes_one(checkout: Checkout) -> None:
    assert checkout.train(*LOCAL, "-m", "seed=3,4", "name=lr").code == 0
    (sweep,) = (checkout.cwd / "sweeps").iterdir()
    assert sweep.name.startswith("lr-")
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1"]


def test_a_bad_job_of_a_multirun_ends_it_before_the_first(checkout: Checkout) -> None:
    outcome = checkout.train(*LOCAL, "-m", "trainer.max_steps=5,none", "sweep_dir=sweep")
    assert outcome.code == 2
    assert outcome.err == "error: trainer.max_steps=none: must be a whole number\n"
    assert os.listdir(checkout.cwd) == []


def test_a_failed_job_does_not_stop_a_multirun(checkout: Checkout) -> None:
    outcome = checkout.train(*LOCAL, "-m", "seed=3,4", "sweep_dir=s", FAKE_RANK="fail-first")
    assert outcome.code == 1
    assert sorted(path.name for path in (checkout.cwd / "s").iterdir()) == ["0", "1"]


def test_a_run_of_a_sweep_that_cannot_be_made_does_not_stop_the_others(checkout: Checkout) -> None:
    """It is made impossible by the run before it, when all have been checked."""
    taken = str(checkout.cwd / "s" / "1")
    outcome = checkout.train(*LOCAL, "-m", "seed=3,4,5", "sweep_dir=s", FAKE_MAKES=taken)
    assert outcome.code == 2
    assert f"error: run_dir={taken} exists already" in outcome.err
    assert "were not started" not in outcome.err
    assert (checkout.cwd / "s" / "2" / "final").is_dir()


def test_a_sweep_that_is_stopped_names_the_runs_that_are_left(checkout: Checkout) -> None:
    mine = checkout.cwd / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "ours.yaml").write_text("trainer:\n  max_steps: 7\n")
    sweep = ("-m", "seed=3,4,5", "sweep_dir=a b", "--config-dir", "mine", "experiment=ours")
    outcome = checkout.train(*LOCAL, *sweep, FAKE_RANK="resumable")
    assert outcome.code == 75
    assert "\n2 run(s) of the sweep were not started; start them with\n" in outcome.err
    commands = [line for line in outcome.err.splitlines() if line.startswith("  shardwright train")]
    assert os.listdir(checkout.cwd / "a b") == ["0"]

    # The commands make what the sweep would have made.
    for number, command in enumerate(commands, 1):
        _, _, *arguments = shlex.split(command)
        assert checkout.train(*arguments).code == 0
        text = (checkout.cwd / "a b" / str(number) / "config.yaml").read_text()
        assert f"seed: {number + 3}\n" in text
        assert "max_steps: 7\n" in text


def test_config_dir_brings_experiments_of_ones_own(checkout: Checkout) -> None:
    mine = checkout.cwd / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "ours.yaml").write_text("defaults:\n  - override /model: gpt2_tiny\nseed: 7\n")
    outcome = checkout.train(
        "--dry-run", "data.sequence_length=64", "--config-dir", "mine", "experiment=ours"
    )
    assert outcome.code == 0
    assert "seed: 7" in outcome.out
    assert "hidden_size: 128" in outcome.out


def pids_of(run_dir: Path, ranks: int) -> list[int]:
    """Wait for ranks that hang; return pid and child's pid of each."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [path.read_text().split() for path in sorted(run_dir.glob("pids-*"))]
        if len(found) == ranks and all(len(pids) == 2 for pids in found):
            return [int(pid) for pids in found for pid in pids]
        time.sleep(0.05)
    raise AssertionError(f"no {ranks} rank(s) in {run_dir}")


def assert_all_gone(pids: list[int], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists() and not _zombie(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.1)


def _zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True
