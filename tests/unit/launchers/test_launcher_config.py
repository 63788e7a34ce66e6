"""What launchers are refused for, before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.train.errors import UserError
from tests.unit.launchers.configs import config


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        (
            {"kind": "torchrun", "nproc_per_node": 1, "nodes": 2},
            "nodes=2 need a rendezvous, but head_address is not given; set it to the first "
            "node's name",
        ),
        (
            {"kind": "torchrun", "nodes": 2, "head_address": "a; rm -rf /"},
            "launcher.head_address",
        ),
        (
            {"kind": "torchrun", "nodes": 2, "min_nodes": 3, "head_address": "a"},
            "min_nodes=3 is more than nodes=2",
        ),
        (
            {"kind": "torchrun", "nodes": 2, "min_nodes": 1, "head_address": "a"},
            "min_nodes=1 continues without a lost node by starting all ranks again, but "
            "max_restarts=0 allows no such start; set max_restarts=3",
        ),
        (
            {
                "kind": "torchrun",
                "nodes": 2,
                "min_nodes": 1,
                "max_restarts": 1,
                "head_address": "a",
                "rendezvous": "static",
            },
            "min_nodes=1 lets nodes come and go, but rendezvous=static fixes their ranks",
        ),
        (
            {
                "kind": "torchrun",
                "nodes": 2,
                "max_restarts": 2,
                "head_address": "a",
                "rendezvous": "static",
            },
            "max_restarts=2 starts ranks again, but with rendezvous=static they would meet where "
            "those before them left their addresses; set rendezvous=c10d, or max_restarts=0",
        ),
        (
            {
                "kind": "torchrun",
                "nproc_per_node": 8,
                "nodes": 3,
                "min_nodes": 1,
                "max_restarts": 1,
                "head_address": "a",
            },
            "is not a multiple of trainer.micro_batch_size=8 x 24 rank(s)",
        ),
        (
            {"kind": "torchrun", "device": "cpu", "bind": "numa"},
            "bind=numa asks which memory is near each rank's GPU, but device=cpu",
        ),
        (
            {"kind": "deepspeed", "include": "a:0"},
            "include=a:0 chooses among the hosts of a hostfile, but hostfile=null",
        ),
        (
            {"kind": "deepspeed", "hostfile": "h", "include": "a", "exclude": "b"},
            "include=a and exclude=b exclude each other",
        ),
        (
            {"kind": "deepspeed", "nodes": 2, "head_address": "a"},
            "nodes=2, but hostfile=null: DeepSpeed starts other nodes over a hostfile",
        ),
        (
            {"kind": "deepspeed", "hostfile": "h", "backend": "mpich"},
            "MPICH's ranks behind a helper that returns 0 whatever they return, so that a "
            "failed run would look like a finished one; set backend=openmpi or backend=pdsh",
        ),
        (
            {"kind": "deepspeed", "hostfile": "h", "bind_cores_to_rank": True},
            "bind_cores_to_rank=true, but DeepSpeed binds no ranks over a hostfile (hostfile=h); "
            "leave it out, or bind by backend=openmpi with backend_arguments=",
        ),
        (
            {"kind": "deepspeed", "hostfile": "h", "backend": "slurm", "ssh_port": 22},
            "ssh_port=22, but backend=slurm starts ranks with srun, without ssh; leave it out",
        ),
        ({"kind": "accelerate", "head_port": 70000}, "launcher.head_port"),
    ],
)
def test_what_contradicts_itself_is_refused(launcher: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config(launcher=launcher)
    assert message in str(error.value)
