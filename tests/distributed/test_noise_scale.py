"""The gradient noise scale that engines log is that of gradients which are computed by hand."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from shardwright.train.config import load
from shardwright.train.loop.noise_scale import estimated
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.distributed.curves import lines
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

RANKS, MICRO_BATCHES, BATCH = 2, 2, 16


def tree_of(tree: dict[str, Any], strategy: str) -> dict[str, Any]:
    tree["strategy"] = STRATEGIES[strategy]
    tree["launcher"]["nproc_per_node"] = RANKS
    tree["trainer"] |= {"max_steps": 2, "debug": {"noise_scale": True}}
    assert tree["trainer"]["global_batch_size"] == BATCH
    return tree


def by_hand(run_dir: Path) -> dict[str, tuple[float, float]]:
    """Return both estimates of the first step, from parts by ranks and by micro-batches."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
        batches = list(itertools.islice(iter(trainer.get_train_dataloader()), MICRO_BATCHES))
        of_micro_batches = torch.stack([gradient(trainer.model, batch) for batch in batches])
        whole = torch.zeros(RANKS, *of_micro_batches.shape)
        whole[rank.index] = of_micro_batches
        dist.all_reduce(whole)
    large = float(whole.mean((0, 1)).square().sum())
    of_ranks = float(whole.mean(1).square().sum(-1).mean())
    of_first = float(whole[:, 0].mean(0).square().sum())
    return {
        "ddp": estimated(of_ranks, large, of_ranks * BATCH, large * BATCH, parts=RANKS),
        "fsdp": estimated(of_first, large, of_first * BATCH, large * BATCH, parts=MICRO_BATCHES),
    }


def gradient(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean gradient of a micro-batch, flat."""
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)
    cross_entropy(logits.float(), batch["labels"].flatten()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_engines_log_what_follows_from_gradients_by_hand(
    strategy: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    expected = ranks(RANKS)(by_hand, frozen_run(tree_of(tiny_tree("clm"), "ddp")))[0][strategy]
    run_dir = frozen_run(tree_of(tiny_tree("clm"), strategy))
    ranks(RANKS)(whole_run, run_dir)
    first = next(line for line in lines(run_dir) if "loss" in line)
    names = ("gradient_square_estimate", "gradient_variance_estimate")
    assert [first[name] for name in names] == pytest.approx(list(expected), rel=1e-4)
    if expected[0] > 0:
        assert first["gradient_noise_scale"] == pytest.approx(expected[1] / expected[0], rel=1e-3)
