"""Golden argv and environment of a run's ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers.commands import prepare_command, rank_command, rank_environment
from launchers.machine import Machine, resolve
from tests.unit.launchers.test_machine import config
from train.config import RunConfig

HOSTILE = ["/runs/a b", "/runs/'q' \"r\"", "/runs/$(rm -rf ~)", "/runs/line\nbreak", "/runs/;&|*"]


def resolved(launcher: str, machine: Machine | None = None, **settings: object) -> RunConfig:
    wanted = config(launcher={"kind": launcher, **settings})
    return resolve(wanted, machine or Machine(), "/runs/a")


def test_local_rank_is_a_python_module() -> None:
    assert rank_command(resolved("local"), Path("/runs/a"), python="/usr/bin/python3") == [
        *("/usr/bin/python3", "-m", "train", "/runs/a")
    ]


def test_torchrun_on_one_node() -> None:
    run = resolved("torchrun", nproc_per_node=4)
    assert rank_command(run, Path("/runs/a"), python="/usr/bin/python3") == [
        *("/usr/bin/python3", "-m", "torch.distributed.run"),
        *("--standalone", "--nnodes=1", "--nproc-per-node=4"),
        *("-m", "train", "/runs/a"),
    ]


@pytest.mark.parametrize("run_dir", HOSTILE)
def test_run_directory_is_one_argument_whatever_its_name(run_dir: str) -> None:
    assert rank_command(resolved("local"), Path(run_dir))[-1] == run_dir
    assert prepare_command(Path(run_dir))[-1] == run_dir
    # torchrun reads $$ as $; what it then runs is tested with real ranks.
    assert rank_command(resolved("torchrun"), Path(run_dir))[-1] == run_dir.replace("$", "$$")


def test_other_modules_get_their_arguments_behind_the_directory() -> None:
    found = rank_command(
        resolved("torchrun"), Path("/runs/a"), module="train.sharded_sample", arguments=["a $x"]
    )
    assert found[-4:] == ["-m", "train.sharded_sample", "/runs/a", "a $$x"]


def test_environment_on_a_cpu() -> None:
    run = resolved("torchrun", nproc_per_node=2)
    assert rank_environment(run, Machine(cores=9), {}, packages=Path("/opt/site")) == {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": "/opt/site",
        "OMP_NUM_THREADS": "4",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def test_environment_on_gpus() -> None:
    here = Machine(compute_capabilities=(9.0, 9.0), cores=32)
    assert rank_environment(resolved("torchrun", here), here, {}, packages=Path("/opt/site")) == {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": "/opt/site",
        "OMP_NUM_THREADS": "16",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30",
    }


def test_cpu_ranks_on_a_machine_with_gpus_see_none() -> None:
    here = Machine(compute_capabilities=(9.0,))
    run = resolved("local", here, device="cpu")
    assert rank_environment(run, here, {})["CUDA_VISIBLE_DEVICES"] == ""


def test_more_ranks_than_cores_still_have_a_thread() -> None:
    run = resolved("torchrun", nproc_per_node=8)
    assert rank_environment(run, Machine(cores=2), {})["OMP_NUM_THREADS"] == "1"


def test_no_loopback_interface_is_named_where_there_is_none() -> None:
    added = rank_environment(resolved("local"), Machine(has_loopback=False), {})
    assert "GLOO_SOCKET_IFNAME" not in added


def test_what_the_user_has_set_stays() -> None:
    user = {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cuda", "PYTHONPATH": "/home/me"}
    added = rank_environment(resolved("local"), Machine(), user, packages=Path("/opt/site"))
    assert not {"OMP_NUM_THREADS", "DS_ACCELERATOR"} & set(added)
    assert added["PYTHONPATH"] == "/opt/site:/home/me"
