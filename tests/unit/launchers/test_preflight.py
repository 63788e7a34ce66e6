"""The run directory is made whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardwright.launchers import preflight
from shardwright.launchers.machine import directories
from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train import config as run_config
from shardwright.train.config import (
    DeepspeedLauncher,
    LauncherConfig,
    RunConfig,
)
from shardwright.train.errors import UserError
from tests.unit.launchers.configs import config


def resolved(run_dir: Path) -> RunConfig:
    return resolve(config(), Machine(), str(run_dir))


def test_run_directory_holds_the_config(tmp_path: Path) -> None:
    run = resolved(tmp_path / "a" / "run")
    directories.create(run, tmp_path / "a" / "run")
    assert run_config.load(tmp_path / "a" / "run") == run
    assert sorted(os.listdir(tmp_path / "a" / "run")) == ["config.yaml", "logs"]


def test_taking_back_removes_only_what_was_made(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    made = directories.create(resolved(tmp_path / "runs/x/run"), tmp_path / "runs/x/run")
    directories.take_back(made)
    assert os.listdir(tmp_path / "runs") == []


def test_taking_back_spares_a_parent_that_others_use(tmp_path: Path) -> None:
    made = directories.create(resolved(tmp_path / "runs/one"), tmp_path / "runs/one")
    directories.create(resolved(tmp_path / "runs/two"), tmp_path / "runs/two")
    directories.take_back(made)
    assert os.listdir(tmp_path / "runs") == ["two"]


def test_run_directory_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "theirs").touch()
    with pytest.raises(UserError, match="exists already"):
        directories.create(resolved(tmp_path / "run"), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["theirs"]


def test_runs_that_another_start_has_made_a_home_for_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, exists = tmp_path / "runs", Path.exists
    (runs / "run").mkdir(parents=True)
    (runs / "run" / "theirs").touch()
    # As it looks to a run that starts at the same time, just before both make the parent.
    monkeypatch.setattr(Path, "exists", lambda path: path != runs and exists(path))
    with pytest.raises(directories.Taken):
        directories.create(resolved(runs / "run"), runs / "run")
    assert os.listdir(runs / "run") == ["theirs"]


def test_run_directory_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        directories.create(resolved(tmp_path / "a/run"), tmp_path / "a/run", claim=interrupted)
    assert os.listdir(tmp_path) == []


def test_run_directory_that_cannot_be_made_leaves_nothing() -> None:
    with pytest.raises(UserError, match=r"run_dir=/proc/a/run cannot be created"):
        directories.create(resolved(Path("/proc/a/run")), Path("/proc/a/run"))


def test_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NUL"):
        preflight.check(resolve(config(), Machine(), "/tmp/a\0b"), Machine())


OWN_ADAM = {"kind": "zero", "stage": 2, "offload_optimizer": "cpu", "cpu_adam": "deepspeed"}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "strategy",
            OWN_ADAM,
            "strategy.cpu_adam=deepspeed is compiled .* no C.. compiler .* strategy.cpu_adam=torch",
        ),
        (
            "trainer",
            {"optimizer": "adamw_8bit"},
            "trainer.optimizer=adamw_8bit is compiled .* there is no C.. compiler",
        ),
        ("trainer", {"compile": True}, "trainer.compile=true compiles on a CPU by a C.. compiler"),
    ],
)
def test_what_is_compiled_needs_a_compiler(
    section: str,
    values: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = resolved(tmp_path / "run").model_dump(mode="json")
    tree[section] = values if section == "strategy" else tree[section] | values
    run = run_config.from_tree(tree)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=message):
        preflight.check(run, Machine(cores=2))


def test_adamw_8bit_needs_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = resolved(tmp_path / "run").model_dump(mode="json")
    tree["trainer"]["optimizer"] = "adamw_8bit"
    run = run_config.from_tree(tree)
    # As where it is not installed.
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="adamw_8bit needs the package torchao, .* `pip install"):
        preflight.check(run, Machine(cores=2))


def with_launcher(tmp_path: Path, launcher: LauncherConfig) -> RunConfig:
    return resolved(tmp_path / "run").model_copy(update={"launcher": launcher})


def test_programs_that_a_hostfile_needs_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher = DeepspeedLauncher(
        kind="deepspeed",
        device="cpu",
        nproc_per_node=1,
        hostfile="hosts",
        include="a:0",
        backend="openmpi",
    )
    with pytest.raises(UserError) as error:
        preflight.check_machine(with_launcher(tmp_path, launcher), Machine(cores=2))
    assert str(error.value).splitlines() == [
        "launcher.backend=openmpi starts ranks with mpirun, which is not installed; install it, "
        "choose another backend, or launcher=torchrun",
        "launcher.backend=openmpi accepts only whole hostfiles, but launcher.include or exclude "
        "is given; write another hostfile, or set backend=pdsh",
    ]
    alone = DeepspeedLauncher(
        kind="deepspeed", device="cpu", nproc_per_node=1, bind_cores_to_rank=True
    )
    with pytest.raises(UserError, match="bind_cores_to_rank=true needs numactl, which is not inst"):
        preflight.check_machine(with_launcher(tmp_path, alone), Machine(cores=2))


def test_deepspeed_carries_no_path_that_it_would_put_into_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/a b")
    launcher = DeepspeedLauncher(
        kind="deepspeed", device="cpu", nproc_per_node=1, hostfile="hosts", backend="openmpi"
    )
    with pytest.raises(UserError, match=r"backend=openmpi gets PYTHONPATH=.*:/a b from DeepSpeed"):
        preflight.check_machine(with_launcher(tmp_path, launcher), Machine(cores=2))
