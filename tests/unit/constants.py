"""Where the sources hold a string: what a registry knows, nothing else is to name."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def files_with(constant: str) -> set[str]:
    """Return the modules of train/ and launchers/ that hold a string by itself, from the top."""
    return {
        str(path.relative_to(ROOT))
        for package in ("train", "launchers")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == constant
    }
