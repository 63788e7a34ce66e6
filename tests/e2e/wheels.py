"""The wheel of a checkout, and the folders that it brings."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

FOLDERS = ("train", "launchers", "conf", "slurm")


def built(source: Path, out: Path) -> Path:
    """Return a wheel of a checkout or of an archive of it, built as `pip install` does."""
    # Without a network, where what builds it is there.
    here = ["--no-build-isolation"] * (importlib.util.find_spec("hatchling") is not None)
    build = ["wheel", "--quiet", "--no-deps", *here, f"--wheel-dir={out}", str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (found,) = out.glob("*.whl")
    return found
