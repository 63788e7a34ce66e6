"""Golden argv and environment of a run's ranks."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from deepspeed.launcher.multinode_runner import PDSHRunner

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.ranks.command import prepare_command, rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.train.errors import UserError
from shardwright.train.process.arguments import decoded
from shardwright.train.program import PACKAGES
from tests.unit.launchers.configs import resolved

HOSTILE = ["/runs/a b", "/runs/'q' \"r\"", "/runs/$(rm -rf ~)", "/runs/line\nbreak", "/runs/;&|*"]


def test_local_rank_is_a_python_module() -> None:
    assert rank_command(resolved("local"), Path("/runs/a"), python="/usr/bin/python3") == [
        *("/usr/bin/python3", "-m", "shardwright.train", "/runs/a")
    ]


def test_torchrun_on_one_node() -> None:
    run = resolved("torchrun", nproc_per_node=4)
    assert rank_command(run, Path("/runs/a"), python="/usr/bin/python3") == [
        *("/usr/bin/python3", "-m", "torch.distributed.run"),
        *("--standalone", "--local-addr=127.0.0.1", "--nnodes=1", "--nproc-per-node=4"),
        *("-m", "shardwright.train", "/runs/a"),
    ]


def test_torchrun_on_nodes_that_come_in_any_order() -> None:
    run = resolved(
        "torchrun",
        nproc_per_node=4,
        nodes=2,
        min_nodes=1,
        max_restarts=3,
        head_address="node1",
        head_port=29501,
        bind="numa",
        device="cuda",
    )
    assert rank_command(run, Path("/runs/a"), python="python") == [
        *("python", "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=4"),
        *("--max-restarts=3", "--numa-binding=node"),
        *("--rdzv-backend=c10d", "--rdzv-id=7e6164a1bfdc942c", "--rdzv-endpoint=node1:29501"),
        *("--rdzv-conf=is_host=1", "-m", "shardwright.train", "/runs/a"),
    ]
    joins = rank_command(run, Path("/runs/a"), node_rank=1)
    assert "--rdzv-conf=is_host=0" in joins, "it would serve a rendezvous of its own, and wait"


def test_torchrun_on_nodes_of_fixed_ranks() -> None:
    run = resolved(
        "torchrun", nproc_per_node=2, nodes=2, rendezvous="static", head_address="10.0.0.1"
    )
    machine = Machine(free_port=23456)
    run = resolve(run, machine, "/runs/a")
    assert rank_command(run, Path("/runs/a"), python="python", node_rank=1) == [
        *("python", "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
        *("--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29500"),
        *("-m", "shardwright.train", "/runs/a"),
    ]


def test_deepspeed_on_this_machine() -> None:
    run = resolved("deepspeed", nproc_per_node=2, bind_cores_to_rank=True)
    here = Machine(free_port=23456)
    assert rank_command(run, Path("/runs/a"), python="python", machine=here) == [
        *("python", "-m", "deepspeed.launcher.runner", "--no_local_rank", "--quiet"),
        *("--bind_cores_to_rank", "--master_port=23456"),
        *("--hostfile=/dev/null", "--num_accelerators=2"),
        *("--module", "shardwright.train", "/runs/a"),
    ]


def test_deepspeed_on_the_gpus_that_the_user_has_chosen() -> None:
    here = Machine(compute_capabilities=(9.0, 9.0, 9.0), cuda_visible_devices="4,5, 6")
    run = resolved("deepspeed", here, nproc_per_node=2)
    command = rank_command(run, Path("/runs/a"), machine=here)
    assert "--include=localhost:4,5" in command
    assert not any(argument.startswith("--num") for argument in command)


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=2\nnode2 slots=2\nnode3 slots=2\nnode4 slots=2\n")
    return str(path)


def test_deepspeed_over_a_hostfile(hosts: str) -> None:
    run = resolved(
        "deepspeed",
        hostfile=hosts,
        include="node2@node3",
        ssh_port=2222,
        backend_arguments="-t 30",
        head_port=29501,
    )
    assert (run.launcher.nodes, run.launcher.nproc_per_node) == (2, 2)  # type: ignore[union-attr]
    command = rank_command(run, Path("/runs/a"), python="python")
    assert command == [
        *("python", "-m", "deepspeed.launcher.runner", "--no_local_rank", "--quiet"),
        *("--master_port=29501", f"--hostfile={hosts}", "--include=node2@node3"),
        *("--launcher=pdsh", "--launcher_args=-t 30", "--master_addr=node2", "--ssh_port=2222"),
        *("--force_multi", "--module", "shardwright.train", "base64:L3J1bnMvYQ=="),
    ]


def test_deepspeeds_other_back_ends_tell_ranks_whose_they_are(hosts: str) -> None:
    run = resolved("deepspeed", hostfile=hosts, backend="openmpi", head_port=29501)
    assert "--launcher=openmpi" in rank_command(run, Path("/runs/a"))
    assert launcher_of(run).files({"OMP_NUM_THREADS": "4"}) == {
        "deepspeed.env": "OMP_NUM_THREADS=4\nSHARDWRIGHT_RANKS_OF=openmpi\n"
        "MASTER_ADDR=node1\nMASTER_PORT=29501\n"
    }
    assert rank_environment(run, Machine(), {})["DS_ENV_FILE"] == "/runs/a/deepspeed.env"


def test_open_mpi_hears_the_port_of_ssh_and_binds_no_rank_to_one_core(hosts: str) -> None:
    run = resolved("deepspeed", hostfile=hosts, backend="openmpi", ssh_port=2222)
    added = rank_environment(run, Machine(), {})
    its_own = {
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_plm_rsh_args": "-p 2222",
    }
    assert its_own.items() <= added.items()
    assert "OMPI_MCA" not in launcher_of(run).files(added)["deepspeed.env"]
    # DeepSpeed has mpirun put literal quotes around what is not plain.
    assert "DS_ENV_FILE" not in launcher_of(run).files(added)["deepspeed.env"]


def test_other_nodes_hear_where_files_are(hosts: str) -> None:
    user = {"HF_HOME": "/hf", "HF_TOKEN": "secret"}
    over_hosts = rank_environment(resolved("deepspeed", hostfile=hosts), Machine(), user)
    assert over_hosts["HF_HOME"] == "/hf"
    assert "HF_TOKEN" not in over_hosts, "DeepSpeed writes them into a file"
    assert "HF_HOME" not in rank_environment(resolved("deepspeed"), Machine(), user)


def test_srun_is_told_how_many_ranks_each_node_has_and_a_script(hosts: str) -> None:
    run = resolved(
        "deepspeed", hostfile=hosts, backend="slurm", head_port=29501, backend_arguments="-c 8"
    )
    module = "shardwright.train.diagnosis.doctor"
    assert rank_command(run, Path("/runs/a"), python="python", module=module) == [
        *("python", "-m", "deepspeed.launcher.runner", "--no_local_rank", "--quiet"),
        *("--master_port=29501", f"--hostfile={hosts}", "--launcher=slurm"),
        "--launcher_args=--nodes=4 --ntasks-per-node=2 --kill-on-bad-exit=1 -c 8",
        *("--master_addr=node1", "--no_ssh_check", "--force_multi"),
        *(f"{PACKAGES}/shardwright/train/diagnosis/doctor.py", "base64:L3J1bnMvYQ=="),
    ]
    assert f"{PACKAGES}/shardwright/train/__main__.py" in rank_command(run, Path("/runs/a"))
    assert "MASTER_ADDR=node1\nMASTER_PORT=29501\n" in launcher_of(run).files({})["deepspeed.env"]


def test_what_a_hostfile_decides_contradicts_nothing(hosts: str) -> None:
    with pytest.raises(UserError) as error:
        resolved("deepspeed", hostfile=hosts, nproc_per_node=8)
    assert f"launcher.nproc_per_node=8, but launcher.hostfile={hosts} gives 2" in str(error.value)
    with pytest.raises(
        UserError, match=r"launcher.hostfile=/nowhere cannot be read \(No such file or directory\);"
    ):
        resolved("deepspeed", hostfile="/nowhere")


@pytest.mark.parametrize("run_dir", [*HOSTILE, "/runs/%h"])
def test_a_run_directory_passes_shells_and_pdsh_unchanged(hosts: str, run_dir: str) -> None:
    argument = rank_command(resolved("deepspeed", hostfile=hosts), Path(run_dir))[-1]
    assert re.fullmatch(r"base64:[A-Za-z0-9_=-]+", argument)
    assert decoded(argument) == run_dir


@pytest.mark.parametrize("value", ["a b", 'a"b', "$(touch /tmp/x)", "a`b`", "a\\b"])
def test_an_environment_passes_the_shell_of_the_other_node_unchanged(
    hosts: str, value: str
) -> None:
    run = resolved("deepspeed", hostfile=hosts)
    line = launcher_of(run).files({"NAME": value})["deepspeed.env"].splitlines()[0]
    exported = PDSHRunner.__new__(PDSHRunner)
    exported.exports = {}
    exported.add_export(*line.split("=", maxsplit=1))
    script = f'export NAME={exported.exports["NAME"]}; printf %s "$NAME"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout == value


def test_accelerate_reads_how_many_there_are_and_nothing_of_the_engine() -> None:
    run = resolved("accelerate", nproc_per_node=2, nodes=2, head_address="node1", head_port=29501)
    assert rank_command(run, Path("/runs/a"), python="python", node_rank=1) == [
        *("python", "-m", "accelerate.commands.launch"),
        *("--config_file=/runs/a/accelerate.yaml", "--machine_rank=1"),
        *("-m", "shardwright.train", "/runs/a"),
    ]
    (text,) = launcher_of(run).files({}).values()
    settings = yaml.safe_load(text)
    assert settings["num_machines"] == 2
    assert settings["num_processes"] == 4
    assert (settings["main_process_ip"], settings["main_process_port"]) == ("node1", 29501)
    assert settings["mixed_precision"] == "no"
    assert not {"deepspeed_config", "fsdp_config"} & settings.keys()


@pytest.mark.parametrize("run_dir", HOSTILE)
def test_run_directory_is_one_argument_whatever_its_name(run_dir: str) -> None:
    assert rank_command(resolved("local"), Path(run_dir))[-1] == run_dir
    assert prepare_command(Path(run_dir))[-1] == run_dir
    # torchrun reads $$ as $; what it then runs is tested with real ranks.
    assert rank_command(resolved("torchrun"), Path(run_dir))[-1] == run_dir.replace("$", "$$")


def test_other_modules_get_their_arguments_behind_the_directory() -> None:
    module = "shardwright.train.sampling.sharded"
    found = rank_command(resolved("torchrun"), Path("/runs/a"), module=module, arguments=["a $x"])
    assert found[-4:] == ["-m", module, "/runs/a", "a $$x"]


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
    run = resolved("torchrun", here)
    assert rank_environment(run, here, {}, packages=Path("/opt/site")) == {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": "/opt/site",
        "OMP_NUM_THREADS": "16",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    # By either of its names the allocator is the user's to set.
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        added = rank_environment(run, here, {name: "max_split_size_mb:128"})
        assert "PYTORCH_ALLOC_CONF" not in added


def test_environment_on_several_nodes() -> None:
    run = resolved("torchrun", nproc_per_node=1, nodes=2, head_address="node1", device="cpu")
    added = rank_environment(run, Machine(interface="ib0"), {})
    assert (added["GLOO_SOCKET_IFNAME"], added["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib0")
    # What is compiled stays on the node: its cores may differ from the next one's.
    assert added["TRITON_CACHE_DIR"].startswith(tempfile.gettempdir())
    assert added["TORCH_EXTENSIONS_DIR"].startswith(tempfile.gettempdir())
    # torch 2.13 leaves a node that comes back without the others' address otherwise.
    assert added["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize("max_restarts", [0, 2])
def test_ranks_that_are_started_again_meet_in_another_store(max_restarts: int) -> None:
    run = resolved("torchrun", nproc_per_node=2, max_restarts=max_restarts)
    added = rank_environment(run, Machine(), {})
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in added) is bool(max_restarts)


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
