"""One preparation, timed within its own process: `python -m benchmarks.timed_prepare ours|peer`.

The peer's is what transformers' run_clm does of a corpus: `map` to tokenise, `map` to join and cut.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 256
RESULT = "figures: "
"""Begins the line that says how it went."""


def ours(run_dir: Path) -> dict[str, Any]:
    """Prepare the data of a run directory; its tokenizer is there, its cache is empty."""
    from transformers import AutoTokenizer

    from shardwright.train import config
    from shardwright.train.data.batches import samples  # noqa: F401
    from shardwright.train.data.prepare import prepare
    from shardwright.train.data.tokens import packing  # noqa: F401
    from shardwright.train.data.tokens.cache import INDEX, cache_root

    settings = config.load(run_dir)
    assert settings.tokenizer.kind == "pretrained"
    AutoTokenizer.from_pretrained(settings.tokenizer.name)  # imports what it needs
    began = time.perf_counter()
    prepared = prepare(settings, run_dir)
    seconds = time.perf_counter() - began
    (index,) = (cache_root(settings.data) / "tokens").glob(f"*/{INDEX}")
    parts = (prepared.training, prepared.held_out)
    return {
        "seconds": seconds,
        "documents": sum(part.documents for part in parts),
        "tokens": sum(part.tokens + part.tokens_left_out for part in parts),
        "encoder": json.loads(index.read_text())["details"].get("encoder"),
    }


def peer(corpus: Path, tokenizer_directory: Path, cache: Path, processes: int) -> dict[str, Any]:
    """Load a corpus and `map` it twice; reading it into Arrow files is timed apart."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        return tokenizer(batch["text"])

    def group(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = {key: list(chain.from_iterable(rows)) for key, rows in batch.items()}
        whole = len(joined["input_ids"]) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
        cut = {
            key: [row[i : i + SEQUENCE_LENGTH] for i in range(0, whole, SEQUENCE_LENGTH)]
            for key, row in joined.items()
        }
        return {**cut, "labels": [list(row) for row in cut["input_ids"]]}

    began = time.perf_counter()
    rows = load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(cache))
    read = time.perf_counter()
    workers = processes if processes > 1 else None
    encoded = rows.map(tokenize, batched=True, num_proc=workers, remove_columns=rows.column_names)
    grouped = encoded.map(group, batched=True, num_proc=workers)
    ended = time.perf_counter()
    return {
        "seconds": ended - read,
        "seconds_to_read": read - began,
        "documents": len(rows),
        "tokens": len(grouped) * SEQUENCE_LENGTH,
    }


def main(argv: list[str]) -> int:
    side, *rest = argv
    if side == "ours":
        figures = ours(Path(rest[0]))
    else:
        corpus, tokenizer, cache, processes = rest
        figures = peer(Path(corpus), Path(tokenizer), Path(cache), int(processes))
    print(RESULT + json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
