"""What a run has logged, without what takes time or memory: the same of two runs that are alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = ("time", "tokens_per_second", "sent_bytes_per_second", "peak_memory_bytes")
OF_RANKS = ("/min", "/median", "/max", "_most_rank")
"""How what is told of the times of ranks ends."""


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return all lines, but for what was measured."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not is_measured(k)} for line in lines]


def is_measured(name: str) -> bool:
    return name in MEASURED or name.endswith(OF_RANKS)
