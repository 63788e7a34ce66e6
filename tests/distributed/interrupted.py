"""Runs that are interrupted and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

ZERO = {"kind": "zero"}


CPU = {"offload_optimizer": "cpu"}


STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero0": {**ZERO, "stage": 0},
    "zero1": {**ZERO, "stage": 1},
    "zero2": {**ZERO, "stage": 2},
    "zero3": {**ZERO, "stage": 3, "sub_group_elements": 3000},
    "zero2_offload": {**ZERO, **CPU, "stage": 2},
    "zero3_offload": {**ZERO, **CPU, "stage": 3, "offload_parameters": "cpu"},
    "fsdp": {"kind": "fsdp"},
    "fsdp_grad_op": {"kind": "fsdp", "reshard_after_forward": False},
    "fsdp_hybrid": {"kind": "fsdp", "replicas": 2},
    "fsdp_offload": {"kind": "fsdp", "offload": True},
}


STEPS, SAVED = 6, 3


def interrupted(source: Path, target: Path, *, step: int = SAVED, **changes: Any) -> Path:
    """Return a copy of a run as it was after a checkpoint, with a changed config."""
    (target / "checkpoints").mkdir(parents=True)
    name = f"checkpoint-{step}"
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    shutil.copy(source / "metrics.jsonl", target)
    shutil.copy(source / "data.json", target)
    shutil.copytree(source / "tokenizer", target / "tokenizer")
    tree = yaml.safe_load((source / "config.yaml").read_text())
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            tree[section][field] = value
        else:
            tree[section] = value
    (target / "config.yaml").write_text(yaml.safe_dump(tree))
    return target
