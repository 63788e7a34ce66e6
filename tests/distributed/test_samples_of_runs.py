"""Runs whose samples are not documents back to back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shardwright.train.config import load
from shardwright.train.data import prepare
from shardwright.train.data.batches.sampler import sample_at
from tests.distributed.curves import curve, lines
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("objective", "strategy", "apart"), [("clm", "ddp", False), ("mlm", "fsdp", True)]
)
def test_padding_of_fitted_rows_counts_for_nothing(
    objective: str,
    strategy: str,
    apart: bool,
    tmp_path: Path,
    corpus: Path,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree(objective)
    tree["strategy"] = {"kind": strategy}
    short = tmp_path / "short.jsonl"  # of two of them a row has room left
    texts = (json.loads(row)["text"][:50] for row in corpus.open())
    short.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tree["data"] |= {"paths": [str(short)], "packing": "best_fit", "document_attention": apart}
    tree["trainer"] |= {"max_steps": 3}
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    prepared = prepare(load(run_dir), run_dir)
    (samples,) = prepared.train.sources
    more = -1 if objective == "clm" else 2
    tokens = [0]
    for position in range(48):
        key = sample_at(0, len(samples), position)
        tokens.append(tokens[-1] + len(samples[key.sample].tokens) + more)
    trained = [line for line in lines(run_dir) if "loss" in line]
    assert [line["tokens"] for line in trained] == [tokens[16 * step] for step in (1, 2, 3)]
    assert tokens[-1] < 48 * 32
    assert all(map(math.isfinite, [*curve(run_dir), *curve(run_dir, "eval_loss")]))
