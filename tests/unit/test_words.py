"""Standard terms, where a native engineer would stumble over another word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("train/**/*.py", "launchers/**/*.py", "conf/**/*.yaml", "docs/*.md", "README.md")
PHRASES = {
    r"gone on from": "resumed",
    r"go on with:": "resume with:",
    r"for ever": "permanently",
    r"hangs on": "depends on",
    r"takes away": "deletes",
    r"may not be written to": "is not writable",
    r"lest": "so that ... not",
    r"for want of": "because there is no",
    r"so many (?:bytes|documents|samples|steps|ranks|evaluations|tokens)": "this many",
    r"mend(?:s|ed)? it": "fix it",
}
NAMES = {
    "ask": "request",
    "asker": "requester",
    "askers": "requesters",
    "heed": "watch",
    "heeds": "watches",
    "heeded": "watched",
    "speak": "generate",
    "speaks": "generates",
    "dice": "rng_state",
}
OF_LIBRARIES = {"launchers/sweep/study.py: ask": "optuna.Study.ask"}
"""Names that are not the project's to choose."""


def sources() -> list[Path]:
    """Return the project's own files whose words users and developers read."""
    return sorted(path for pattern in FILES for path in ROOT.glob(pattern))


def texts(path: Path) -> Iterator[str]:
    """Yield what a user may read in a file: all of it, or of Python its strings but docstrings."""
    text = path.read_text()
    if path.suffix != ".py":
        yield text
        return
    tree = ast.parse(text)
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Constant) and isinstance(value, str) and id(node) not in documents:
            yield value


def names(path: Path) -> Iterator[str]:
    """Yield the names that a Python file defines or uses."""
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("name", "id", "attr", "arg"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


def test_what_users_read_is_said_in_standard_terms() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}; say {instead!r}"
        for path in sources()
        for text in texts(path)
        for phrase, instead in PHRASES.items()
        for match in re.finditer(rf"\b{phrase}(?!\w)", re.sub(r"\s+", " ", text))
    ]
    assert not found, "\n".join(found)


def test_names_are_made_of_standard_terms() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}; say {NAMES[word]!r}"
        for path in sources()
        if path.suffix == ".py"
        for name in names(path)
        for word in name.lower().split("_")
        if word in NAMES and f"{path.relative_to(ROOT)}: {name}" not in OF_LIBRARIES
    ]
    assert not found, "\n".join(sorted(set(found)))
