"""Configs for each launcher."""

from __future__ import annotations

from typing import Any

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.config import RunConfig, from_tree
from tests.unit import trees


def slurm_run(run_dir: str = "/runs/a", **settings: Any) -> RunConfig:
    return resolve(config(launcher={"kind": "slurm", **settings}), Machine(), run_dir)


TREE = {
    **trees.TREE,
    "data": {"kind": "stdlib", "sequence_length": 64},
    "launcher": {"kind": "torchrun"},
}


def config(**sections: object) -> RunConfig:
    return from_tree({**TREE, **sections})


def resolved(launcher: str, machine: Machine | None = None, **settings: object) -> RunConfig:
    wanted = config(launcher={"kind": launcher, **settings})
    return resolve(wanted, machine or Machine(), "/runs/a")
