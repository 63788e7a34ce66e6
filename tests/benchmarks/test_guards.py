"""Ours stay ahead of the stock Trainer: ratios of counts in each change, of times in `make bench`.

The model has kantaibert's proportions, a twelfth as wide, so that the head's share of the work, two
fifths, is that of the real one.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from shardwright.train.loop.trainer import IGNORED, Trainer
from shardwright.train.model.labelled_head import LabelledHead, positions_of
from tests.benchmarks import guards
from tests.fixtures import Freeze, RanksOf, TreeOf

WIDTH = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "vocab_size": 4333,
    "max_position_embeddings": 130,
}


def frozen(tiny_tree: TreeOf, frozen_run: Freeze, objective: str, **data: Any) -> Path:
    tree = tiny_tree(objective)
    tree["model"] |= WIDTH
    tree["data"] |= {"sequence_length": 128, "eval_fraction": 0, **data}
    tree["strategy"] = {"kind": "single"}
    tree["launcher"] |= {"nproc_per_node": 1}
    tree["trainer"] |= {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 8}
    return frozen_run(tree)


def both(ranks: RanksOf, run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    (ours,), (stock,) = (ranks(1)(side, run_dir) for side in (guards.ours, guards.stock))
    return ours, stock


@pytest.mark.distributed
def test_masked_models_multiply_less_and_keep_less(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    ours, stock = both(ranks, frozen(tiny_tree, frozen_run, "mlm"))
    assert ours["loss"] == pytest.approx(stock["loss"], abs=1e-4)
    assert stock["flops"] / ours["flops"] > 1.4
    assert stock["bytes_kept"] / ours["bytes_kept"] > 1.4


@pytest.mark.distributed
def test_lines_of_all_lengths_are_not_padded(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    """The stock Trainer pads each batch to its longest line."""
    lines: dict[str, Any] = {"line_by_line": True, "max_cut_fraction": 0.5}
    lines |= {"unpad": True, "document_attention": True}
    ours, stock = both(ranks, frozen(tiny_tree, frozen_run, "mlm", **lines))
    assert ours["loss"] == pytest.approx(stock["loss"], abs=1e-4)
    assert stock["flops"] / ours["flops"] > 1.7
    assert stock["bytes_kept"] / ours["bytes_kept"] > 1.6


@pytest.mark.distributed
def test_causal_models_multiply_no_more_and_keep_no_more(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    ours, stock = both(ranks, frozen(tiny_tree, frozen_run, "clm"))
    assert ours["loss"] == pytest.approx(stock["loss"] * 128 / 127, rel=5e-3)
    assert stock["flops"] / ours["flops"] >= 0.999
    assert stock["bytes_kept"] / ours["bytes_kept"] >= 0.999


@pytest.mark.bench
@pytest.mark.timeout(1200)
def test_a_masked_models_step_takes_less_time() -> None:
    """At full width, in turns: its head is computed where a token is to be predicted alone."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=52_000, num_hidden_layers=6, max_position_embeddings=130, use_cache=False
    )
    model = RobertaForMaskedLM(config).train()
    ids = torch.randint(5, 52_000, (2, 128))
    labels = torch.where(torch.rand(ids.shape) < 0.15, ids, IGNORED)
    head = LabelledHead(model)
    positions = positions_of(labels, IGNORED)

    def plain() -> None:
        Trainer.loss(model(input_ids=ids), labels).backward()

    def labelled() -> None:
        with head.at(positions):
            logits = model(input_ids=ids)
        Trainer.loss(logits, labels.flatten()[positions]).backward()

    seconds: dict[str, list[float]] = {"plain": [], "labelled": []}
    sides = {"plain": plain, "labelled": labelled}
    for turn in range(5):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - began)
            model.zero_grad()
    assert median(seconds["plain"]) / median(seconds["labelled"]) > 1.15
