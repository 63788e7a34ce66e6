"""Shardwright, by the one name that it has where it is installed: train, launchers, conf, slurm.

A wheel has these folders in here. A checkout has them at its top, and links to them in here. What
programs call is taken from launchers/api.py and launchers/notebook.py when it is first asked for.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# A copy of a checkout may have lost its links, as where a file system knows none.
if not Path(__path__[0], "train", "__init__.py").is_file():
    __path__.append(str(Path(__file__).resolve().parents[1]))

_FUNCTIONS = {
    **dict.fromkeys(
        ("compose", "resume", "recover", "load_run", "read_metrics", "Run", "RunFailed"),
        "shardwright.launchers.api",
    ),
    "UserError": "shardwright.train.errors",
    "notebook_launch": "shardwright.launchers.notebook",
}
__all__ = [*_FUNCTIONS, "train"]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS})


class _Train(ModuleType):
    """The package shardwright.train, which is called to train."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from shardwright.launchers import api

        return api.train(*arguments, **options)


importlib.import_module("shardwright.train")
sys.modules["shardwright.train"].__class__ = _Train
