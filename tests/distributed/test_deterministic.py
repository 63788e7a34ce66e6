"""trainer.deterministic: on every rank, read back, and with no effect on what is learned."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from shardwright.train.config import load
from shardwright.train.process import numerics
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.distributed.curves import lines
from tests.distributed.jobs import trained, whole_run
from tests.distributed.pool import RanksFailed
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


def set_in_the_rank(trainer: Any) -> dict[str, Any]:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "cudnn": torch.backends.cudnn.deterministic,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "flash_attention_2": os.environ.get("FLASH_ATTENTION_DETERMINISTIC"),
    }


def calls_what_does_not_repeat(run_dir: Path) -> None:
    """Train a model whose last norm calls an operation without a kernel that repeats."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        _call_it(run_dir, rank)


def _call_it(run_dir: Path, rank: Rank) -> None:
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    norm: Any = trainer.model.transformer.ln_f  # type: ignore[union-attr]
    norm.register_forward_hook(lambda *_: torch.zeros(1).put_(torch.zeros(1).long(), torch.ones(1)))
    trainer.train()


def tree_of(tree: dict[str, Any], strategy: str, *, deterministic: bool) -> dict[str, Any]:
    # Odd sizes: partitions have padding, of which no bit may be read.
    tree["model"] |= {"vocab_size": 389, "intermediate_size": 67, "dropout": 0.1}
    tree["strategy"] = STRATEGIES[strategy]
    tree["trainer"] |= {"max_steps": 3, "save_every_steps": 2, "deterministic": deterministic}
    return tree


@pytest.mark.parametrize(
    "strategy",
    [
        *("ddp", "zero3", "fsdp"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("zero0", "zero1", "zero2", "zero3_offload", "fsdp_grad_op")
        ),
    ],
)
def test_it_is_so_in_every_rank_and_learns_the_same(
    strategy: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    plain, asked = (
        frozen_run(tree_of(tiny_tree("clm"), strategy, deterministic=deterministic))
        for deterministic in (False, True)
    )
    ranks(2)(whole_run, plain)
    for found in ranks(2)(trained, asked, set_in_the_rank):
        assert found == {
            "algorithms": True,
            "fills": True,
            "cudnn": True,
            "cublas": ":4096:8",
            "flash_attention_2": "1",
        }
    facts = {path: json.loads((path / "engine.json").read_text()) for path in (plain, asked)}
    assert facts[plain]["deterministic"] == []
    assert facts[asked]["deterministic"] == list(numerics.DETERMINISTIC)
    measured = [
        [(line["loss"], line["grad_norm"]) for line in lines(path) if "loss" in line]
        for path in (plain, asked)
    ]
    assert measured[0] == measured[1]


def test_what_has_no_kernel_that_repeats_ends_the_run_in_words(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    run_dir = frozen_run(tree_of(tiny_tree("clm"), "fsdp", deterministic=True))
    with pytest.raises(RanksFailed) as failed:
        ranks(2)(calls_what_does_not_repeat, run_dir)
    assert "shardwright.train.errors.UserError: trainer.deterministic=true: torch" in str(
        failed.value
    )
    assert "has no deterministic kernel for put_, which this run calls; set" in str(failed.value)


def switched_back(run_dir: Path) -> None:
    """Train where something tells torch only to warn."""
    with mock.patch.object(
        torch, "is_deterministic_algorithms_warn_only_enabled", return_value=True
    ):
        trained(run_dir, lambda _: None)


def test_a_rank_that_is_not_told_so_is_stopped_before_its_first_step(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    run_dir = frozen_run(tree_of(tiny_tree("clm"), "ddp", deterministic=True))
    with pytest.raises(RanksFailed, match="deterministic: the config requires .*algorithms"):
        ranks(2)(switched_back, run_dir)
    assert not (run_dir / "metrics.jsonl").exists()
