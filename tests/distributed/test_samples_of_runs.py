"""Runs whose samples are not all documents back to back: fitted rows, and stages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.config import load
from shardwright.train.data import prepare
from shardwright.train.data.batches.sampler import sample_at
from tests.distributed.curves import curve, lines
from tests.distributed.interrupted import interrupted
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


@pytest.fixture
def staged(tmp_path: Path, corpus: Path, tiny_tree: TreeOf, frozen_run: Freeze) -> Path:
    """Return a run of three stages of two steps each, with a checkpoint after each step."""
    rows = [json.loads(row) for row in corpus.open()]
    paths = []
    for name, part in (("a", rows[::2]), ("b", rows[1::2])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        paths.append(str(path))
    stages: list[dict[str, Any]] = [
        {"tokens": 2 * 512},
        {"tokens": 2 * 512, "weights": [0.0, 1.0], "sequence_length": 64},
        {"weights": [2.0, 0.5], "sequence_length": 16},
    ]
    tree = tiny_tree("clm")
    tree["data"] |= {"paths": paths, "stages": stages, "document_attention": True}
    tree["trainer"] |= {"max_steps": 6, "save_every_steps": 1}
    tree["checkpoint"] = {"keep_last": 6}
    return frozen_run(tree)


def test_a_run_goes_through_stages_of_other_lengths(
    tmp_path: Path, staged: Path, ranks: RanksOf
) -> None:
    ranks(2)(whole_run, staged)
    trained = [line for line in lines(staged) if "loss" in line]
    assert [line["tokens"] for line in trained] == [512 * step for step in range(1, 7)]
    assert [line["samples"] for line in trained] == [16 * step for step in range(1, 7)]
    assert all(map(math.isfinite, curve(staged)))
    card = (staged / "final/README.md").read_text()
    assert "| Stage 2 | samples of 64 tokens, for 1,024 tokens |" in card
    # Resumed in the middle of each stage, on as many ranks as may be, it sees the same samples.
    for step, world_size, strategy in ((1, 1, "ddp"), (3, 4, "fsdp"), (5, 1, "ddp")):
        resumed = interrupted(
            staged,
            tmp_path / f"resumed-{step}",
            step=step,
            strategy={"kind": strategy},
            launcher__nproc_per_node=world_size,
        )
        (said,) = {text for text in ranks(world_size)(whole_run, resumed) if text}
        assert f"resuming from checkpoint-{step}" in said
        assert curve(resumed) == pytest.approx(curve(staged), abs=1e-5)
        again = [line for line in lines(resumed) if "loss" in line]
        assert [line["tokens"] for line in again] == [line["tokens"] for line in trained]
