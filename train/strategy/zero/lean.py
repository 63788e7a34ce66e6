"""deepspeed without what it imports for a tuner: seconds of each rank's start."""

from __future__ import annotations

import importlib
import sys


def import_deepspeed() -> None:
    """Import `deepspeed`, and `mlflow` only where a run tracks by it.

    deepspeed/autotuning/autotuner.py imports `mlflow` where it is installed, for its own searches
    (deepspeed 0.19). As missing as it is told to be here, it does without.
    """
    if "deepspeed" in sys.modules or "mlflow" in sys.modules:
        importlib.import_module("deepspeed")
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # what an import of it then fails by
    try:
        importlib.import_module("deepspeed")
    finally:
        del sys.modules["mlflow"]
