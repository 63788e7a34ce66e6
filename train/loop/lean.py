"""transformers' Trainer without what it imports for others: seconds of each rank's start."""

from __future__ import annotations

import importlib
import sys

import accelerate.utils.other
import transformers.utils


def import_trainer() -> None:
    """Import `transformers.Trainer`, and neither `datasets` nor `deepspeed` where no engine does.

    transformers/trainer.py imports `datasets` where it is installed, to tell whether what it trains
    on is from there; here that is the loader's own. accelerate/utils/other.py imports `deepspeed`
    likewise (`extract_model_from_parallel`), to tell whether a model is wrapped by it; one that is
    has been wrapped by a process that has imported it. transformers 5.23, accelerate 1.15.
    """
    name = "is_datasets_available"
    if "transformers.trainer" not in sys.modules and hasattr(transformers.utils, name):
        is_installed = getattr(transformers.utils, name)
        setattr(transformers.utils, name, lambda: False)
        try:
            importlib.import_module("transformers.trainer")
        finally:
            setattr(transformers.utils, name, is_installed)
    if hasattr(accelerate.utils.other, "is_deepspeed_available"):
        accelerate.utils.other.is_deepspeed_available = lambda: "deepspeed" in sys.modules
