"""Natural text that every machine has: what the standard library's docstrings say, by paragraphs.

As lines they have the lengths that people write: a few words mostly, and some hundreds at times.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST_CHARACTERS = 20
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def paragraphs() -> list[str]:
    """Return each paragraph once, as one line, in an order that does not change."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            found |= dict.fromkeys(of_source(path.read_bytes()))
    return list(found)


def of_source(source: bytes) -> Iterator[str]:
    """Yield the paragraphs of a module's docstrings; none where it is no Python. Pure."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            for paragraph in re.split(r"\n\s*\n", text):
                line = " ".join(paragraph.split())
                if len(line) >= SHORTEST_CHARACTERS and line.isprintable():
                    yield line


def write(folder: Path, lines: list[str]) -> None:
    """Write the text in the forms that programs read: a line each, or a JSON document each.

    The same documents lie there as .json too, by which name alone some programs take them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("held_out", lines[:20]), ("train", lines[20:])):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
        documents = "".join(json.dumps({"text": line}) + "\n" for line in part)
        for suffix in ("json", "jsonl"):
            (folder / f"{name}.{suffix}").write_text(documents, encoding="utf-8")
