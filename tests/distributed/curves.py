"""What runs have logged, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(run_dir) if key in line]
