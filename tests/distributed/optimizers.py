"""The optimizers, and what each needs of the machine."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

PARTS = Path(__file__).parents[1] / "example_parts.py"
HAS_COMPILER = shutil.which("c++") is not None and shutil.which("ninja") is not None


needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler or no ninja")


needs_torchao = pytest.mark.skipif(
    not HAS_COMPILER or importlib.util.find_spec("torchao") is None,
    reason="torchao is not installed, or no C++ compiler",
)


# Rates at which a tiny model learns something in twenty steps.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adafactor": {"optimizer": "adafactor", "learning_rate": 0.1},
    "muon": {"optimizer": "muon", "learning_rate": 3e-3},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "lion": {"optimizer": "lion", "learning_rate": 5e-4},
    "schedule_free": {
        "optimizer": "schedule_free",
        "lr_scheduler": "constant",
        "warmup_steps": 3,
        "learning_rate": 3e-3,
    },
    "sgd": {"optimizer": "sgd", "learning_rate": 0.3},
    "custom": {
        "optimizer": "custom",
        "custom_class": f"{PARTS}:SignMomentum",
        "custom_options": {"beta": 0.8},
        "custom_moments": 1,
        "learning_rate": 2e-3,
    },
}


COMPILED_FOR_DTENSORS = ("adamw_8bit", "fsdp")
"""torch never frees what the guards of its compiled step hold, a mesh with its groups included."""


PURE_BF16 = {
    "compute_dtype": "bf16",
    "reduce_dtype": "bf16",
    "master_dtype": "bf16",
    "moments_dtype": "bf16",
}
