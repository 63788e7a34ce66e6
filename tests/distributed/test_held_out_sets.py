"""The losses of held-out sets over ranks, against the model of final/ and the texts themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardwright.train.data.sources.corpus import is_held_out
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed

LENGTH = 32


def measured(model: Any, tokenizer: Any, texts: list[str]) -> tuple[float, int, float]:
    """Return the summed loss of texts, of how many labels, and tokens per byte."""
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = [ids[at : at + LENGTH + 1] for at in range(0, len(ids) - LENGTH, LENGTH)]
    total = 0.0
    with torch.no_grad():
        for row in torch.tensor(rows).split(64):
            logits = model(input_ids=row[:, :-1]).logits
            labels = row[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            total += loss.item()
    return total, len(rows) * LENGTH, len(ids) / sum(len(text.encode()) for text in texts)


def test_an_evaluation_tells_the_loss_of_each_source_and_set(
    corpus: Path,
    tmp_path: Path,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    texts = [json.loads(row)["text"] for row in corpus.open()]
    texts = [text for text in texts if text.strip()]
    parts = {"first": texts[::2], "second": texts[1::2][:60], "exam": texts[:7]}
    for name, part in parts.items():
        rows = (json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    tree = tiny_tree("clm")
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in parts}
    sets = {"exam": paths.pop("exam")}
    tree["data"] |= {"paths": [*paths.values()], "weights": [1.0, 2.0], "eval_paths": sets}
    tree["trainer"] |= {"max_steps": 2, "eval_every_steps": 2, "eval_max_samples": None}
    tree["trainer"]["eval_micro_batch_size"] = 3
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    (found,) = [line for line in lines if "eval_loss" in line]
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final")
    held_out = {name: [t for t in parts[name] if is_held_out(t, 0.1)] for name in paths}
    expected = {
        name: measured(model, tokenizer, part)
        for name, part in {**held_out, "exam": parts["exam"]}.items()
    }
    for name, (loss, labels, tokens_per_byte) in expected.items():
        assert found[f"eval_loss/{name}"] == pytest.approx(loss / labels, abs=1e-5)
        bits = loss / labels * tokens_per_byte / math.log(2)
        assert found[f"eval_bits_per_byte/{name}"] == pytest.approx(bits, abs=1e-5)
    own = [expected[name] for name in paths]
    mean = sum(loss for loss, *_ in own) / sum(labels for _, labels, _ in own)
    assert found["eval_loss"] == pytest.approx(mean, abs=1e-5)
    _, _, tokens_per_byte = measured(model, tokenizer, held_out["first"] + held_out["second"])
    assert found["eval_bits_per_byte"] == pytest.approx(
        mean * tokens_per_byte / math.log(2), abs=1e-5
    )
