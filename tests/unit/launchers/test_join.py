"""Which node may join a run, and as which."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.launchers.commands.join import node_rank_of
from shardwright.train.config import (
    AccelerateLauncher,
    LauncherConfig,
    LocalLauncher,
    RunConfig,
    TorchrunLauncher,
)
from shardwright.train.errors import UserError
from tests.unit.launchers.configs import config


def with_launcher(launcher: LauncherConfig) -> RunConfig:
    return config().model_copy(update={"launcher": launcher})


SEVERAL: dict[str, Any] = {
    "device": "cpu",
    "nproc_per_node": 1,
    "nodes": 3,
    "head_address": "a",
    "head_port": 1,
}


@pytest.mark.parametrize(
    ("launcher", "asked", "message"),
    [
        (LocalLauncher(kind="local"), None, "launcher=local of .* starts all of its ranks itself"),
        (
            AccelerateLauncher(kind="accelerate", **SEVERAL),
            None,
            "launcher=accelerate gives each node its rank; add --node-rank N, from 1 to 2",
        ),
        (
            TorchrunLauncher(kind="torchrun", **SEVERAL),
            3,
            "--node-rank 3, but the run has 3 nodes and its first one is 0; give 1 to 2",
        ),
    ],
)
def test_a_node_that_cannot_join_is_told_why(
    launcher: LauncherConfig, asked: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        node_rank_of(with_launcher(launcher), asked)


def test_a_node_joins_with_its_rank_or_in_any_order() -> None:
    run = with_launcher(TorchrunLauncher(kind="torchrun", **SEVERAL))
    assert node_rank_of(run, 2) == 2
    assert node_rank_of(run, None) == 1
