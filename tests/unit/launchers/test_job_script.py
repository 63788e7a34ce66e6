"""Golden job scripts, and values that a shell or sbatch would like to interpret."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.kinds import deepspeed, torchrun
from shardwright.launchers.slurm.environment import job_environment
from shardwright.launchers.slurm.script import Array, directives, job_script, submit_command
from shardwright.launchers.slurm.submit import array_of
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from tests.unit.environments import OF_A_RANK, THE_USERS
from tests.unit.launchers.configs import slurm_run

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "/runs/a 'b' \"c\" $(touch pwned) `touch pwned` ${HOME} @python@ ;&|#\n#SBATCH --wrap=x"


def script(run: RunConfig, **how: Any) -> str:
    environment = job_environment(run, {}, packages=Path("/opt/site"), cache=Path("/tmp/me"))
    where = {"directory": Path("/home/me"), "has_site": True, "python": "/usr/bin/python3"}
    return job_script(run, environment, **{**where, **how})


EVERYTHING: dict[str, Any] = {
    "nodes": 2,
    "gpus_per_node": 4,
    "gpu_type": "a100",
    "cpus_per_rank": 12,
    "memory_per_node": "480G",
    "time_limit": "1-00:00:00",
    "partition": "gpu",
    "account": "lab",
    "qos": "normal",
    "constraint": "a100|h100",
    "exclusive": True,
    "dependency": "afterok:17?afterany:18",
    "mail_user": "me@example.org",
    "mail_type": ["FAIL", "TIME_LIMIT"],
    "extra_sbatch": ["--reservation=lab", "--nice"],
    "grace_seconds": 299.5,
}


@pytest.mark.parametrize(
    "name", ["smallest", "everything", "array", "hostile", "torchrun", "deepspeed"]
)
def test_golden_job_script(name: str) -> None:
    made = {
        "smallest": lambda: script(slurm_run(), has_site=False),
        "everything": lambda: script(slurm_run(**EVERYTHING)),
        "array": lambda: script(
            slurm_run("/sweeps/b/0", array_limit=2), array=Array(Path("/sweeps/b"), 5)
        ),
        "hostile": lambda: script(
            slurm_run(HOSTILE), directory=Path(HOSTILE), python=f"{HOSTILE}/python"
        ),
        "torchrun": lambda: script(slurm_run(nodes=2, starts="torchrun")),
        "deepspeed": lambda: script(slurm_run(nodes=2, starts="deepspeed")),
    }[name]()
    golden = GOLDEN / f"{name}.sbatch"
    # To accept a change: delete the file, run the test once, and read what it has written.
    if not golden.exists():
        golden.write_text(made)
        pytest.fail(f"{golden} was not there; it is now")
    assert made == golden.read_text()
    assert subprocess.run(["bash", "-n", str(golden)]).returncode == 0


def test_hostile_values_reach_the_shell_as_they_are_and_never_run(tmp_path: Path) -> None:
    home = tmp_path / HOSTILE[6:].replace("/", "")
    home.mkdir()
    (home / "site.sh").write_text("echo \"site of $run_dir\"\nexport PICKED='by site'\n")
    text = script(slurm_run(str(home)), directory=home, python=f"{home}/python")
    values, _, _ = text.partition("# --- signals")
    shown = subprocess.run(
        ["bash", "-c", values + '\nprintf "%s\\0" "$run_dir" "$python" "$PWD" "$PICKED"'],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
    )
    *_, run_dir, python, directory, picked, end = shown.stdout.split("\0")
    assert run_dir.endswith(f"site of {home}\n{home}")
    assert (python, directory, picked, end) == (f"{home}/python", str(home), "by site", "")
    assert list(tmp_path.rglob("pwned")) == []


FAKE_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for SLURM_NODEID in 0 1; do
  export SLURM_NODEID SLURM_PROCID=$SLURM_NODEID SLURM_LOCALID=0
  export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1
  "$@"
done
"""
FAKE_PYTHON = """#!/bin/bash
case $2 in
  shardwright.launchers.relay|shardwright.train)
    printf '%s\\0' "$RANK" "$INSIDE" "$0" "$@" >"$TOLD.$SLURM_NODEID" ;;
esac
"""


@pytest.fixture
def fake_cluster(tmp_path: Path) -> Path:
    """A directory whose programs stand for SLURM's, on two nodes, and for Python."""
    programs = {
        "srun": FAKE_SRUN,
        "scontrol": "#!/bin/bash\nprintf 'node1\\nnode2\\n'\n",
        "python $HOME": FAKE_PYTHON,
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def told(run: RunConfig, cluster: Path, *, inside: str = "()") -> list[list[str]]:
    """Run a job's script; return RANK, the site's word and the argv of each node's task."""
    python = cluster / "python $HOME"
    (Path(str(run.run_dir)) / "site.sh").write_text(f"inside={inside}\n")
    path = cluster / "job"
    path.write_text(script(run, directory=cluster, python=str(python)))
    ended = subprocess.run(
        ["bash", str(path)],
        env={"PATH": f"{cluster}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "TOLD": f"{cluster}/told"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    texts = [(cluster / f"told.{node}").read_text() for node in (0, 1)]
    return [text.removesuffix("\0").split("\0") for text in texts]


@pytest.mark.parametrize(("inside", "word"), [("()", ""), ("(env INSIDE='a b')", "a b")])
@pytest.mark.parametrize("starts", ["ranks", "torchrun", "deepspeed"])
def test_what_a_job_starts_is_told_what_a_shell_would_tell_it(
    starts: str, inside: str, word: str, fake_cluster: Path
) -> None:
    home = fake_cluster / "a '$b' `touch pwned` \"c\" *"
    home.mkdir()
    run = slurm_run(str(home), nodes=2, starts=starts)
    python, port = str(fake_cluster / "python $HOME"), "20049"
    relay = [python, "-m", "shardwright.launchers.relay", "--grace-seconds", "120"]
    for node, (rank, said, *argv) in enumerate(told(run, fake_cluster, inside=inside)):
        expected = {
            "ranks": [python, "-m", "shardwright.train", str(home)],
            "torchrun": [
                *relay,
                *torchrun.argv(
                    python,
                    nodes="2",
                    ranks_per_node="1",
                    rendezvous=torchrun.c10d("7-0", f"node1:{port}", is_host=str(1 - node)),
                    module="shardwright.train",
                    arguments=torchrun.plain([str(home)]),
                ),
            ],
            "deepspeed": [
                *relay,
                *deepspeed.argv(
                    python,
                    switches=["--no_ssh"],
                    port=port,
                    hostfile=f"{home}/hostfile",
                    further=["--master_addr=node1", f"--node_rank={node}"],
                    program=["--module", "shardwright.train", str(home)],
                ),
            ],
        }
        assert argv == expected[starts]
        assert (rank, said) == (str(node) if starts == "ranks" else "", word)
    if starts == "deepspeed":
        assert (home / "hostfile").read_text() == "node1 slots=1\nnode2 slots=1\n"
    assert list(fake_cluster.rglob("pwned")) == []


def test_directives_hold_no_path_and_nothing_that_sbatch_would_split() -> None:
    lines = directives(slurm_run(HOSTILE, **EVERYTHING))
    assert not [line for line in lines if HOSTILE[:8] in line or any(c in line for c in " '\"\n")]
    sbatch = submit_command(Path(HOSTILE))
    assert sbatch[2:] == [f"--chdir={HOSTILE}", f"{HOSTILE}/job.sbatch"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"gpus_per_node": 4}, "--gres=gpu:4"),
        ({"gpus_per_node": 4, "gpu_request": "gpus-per-node"}, "--gpus-per-node=4"),
        (
            {"gpus_per_node": 4, "gpu_request": "gpus-per-node", "gpu_type": "h100"},
            "--gpus-per-node=h100:4",
        ),
        ({"memory_per_node": "all"}, "--mem=0"),
        ({"time_limit": 90}, "--time=90"),
        ({"requeue": False}, "--no-requeue"),
        ({"grace_seconds": 0.5}, "--signal=B:USR1@1"),
    ],
)
def test_directive(settings: dict[str, Any], line: str) -> None:
    assert line in directives(slurm_run(**settings))


def test_gpus_that_a_partition_brings_are_not_asked_for() -> None:
    run = slurm_run(gpus_per_node=4, gpu_request="none")
    assert (run.launcher.device, run.launcher.world_size) == ("cuda", 4)
    assert not [line for line in directives(run) if "gpu" in line]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "a b"}, "launcher.partition: a b has to be one word"),
        ({"account": "x\n#SBATCH --wrap=id"}, "launcher.account: .* has to be one word"),
        ({"qos": "$(id)'"}, "has to be one word"),
        ({"constraint": ""}, "launcher.constraint: '' has to be one word"),
        ({"time_limit": "1:30"}, "1:30 is read differently by SLURM and by people; write minutes"),
        # 12:00:00 without quotes in a YAML file.
        ({"time_limit": 43200}, 'days-hours:minutes:seconds", such as "30-00:00:00"'),
        ({"time_limit": 0}, "launcher.time_limit=0: must be at least 1"),
        ({"memory_per_node": "64"}, "64 needs a unit, since SLURM takes a plain number for mega"),
        ({"memory_per_node": "64GB"}, "such as 64G, or all"),
        (
            {"dependency": "17"},
            "17 is not a dependency that SLURM knows; write one such as afterok",
        ),
        ({"mail_type": ["fail"]}, r"launcher.mail_type.0=fail: must be .*FAIL"),
        ({"extra_sbatch": ["reservation=lab"]}, "reservation=lab is not a whole flag of sbatch"),
        ({"extra_sbatch": ["--comment=a b"]}, "has to be one word"),
        ({"extra_sbatch": ["--time=5"]}, "--time is decided by launcher.time_limit; leave it out"),
        ({"gpu_type": "a100"}, "gpu_type=a100 says which GPUs, but gpus_per_node=0 requests none"),
        ({"device": "cuda"}, "device=cuda needs GPUs, but gpus_per_node=0 requests none"),
        (
            {"gpus_per_node": 2, "device": "cuda", "nproc_per_node": 4},
            "nproc_per_node=4 ranks need as many GPUs, but gpus_per_node=2",
        ),
        ({"grace_seconds": 70000.0}, "launcher.grace_seconds=70000.0: must be at most 65535"),
    ],
)
def test_what_slurm_would_misread_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        slurm_run(**settings)


def test_a_sweep_is_one_array_where_its_runs_are_alike_for_slurm() -> None:
    runs = [slurm_run(f"/sweeps/a/{number}") for number in range(3)]
    assert array_of(runs) == Array(Path("/sweeps/a"), 3)
    assert array_of(runs[:1]) is None
    assert array_of([*runs[:2], slurm_run("/sweeps/a/2", nodes=2)]) is None


def test_a_job_forgets_whose_rank_its_shell_was() -> None:
    """sbatch carries the environment of the shell along."""
    golden = (GOLDEN / "smallest.sbatch").read_text()
    (line,) = [line for line in golden.splitlines() if line.startswith("unset ")]
    ended = subprocess.run(
        ["bash", "-c", f"{line}\nenv"],
        env={"PATH": os.environ["PATH"], **OF_A_RANK, **THE_USERS},
        capture_output=True,
        text=True,
        check=True,
    )
    left = {entry.partition("=")[0] for entry in ended.stdout.splitlines()}
    assert not left & OF_A_RANK.keys()
    assert left >= THE_USERS.keys()
