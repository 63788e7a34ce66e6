"""The folder tree is the architecture: who may import whom, lazily and for types alone too."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each room imports only from those above it. They are named as folders are; imported, all of them
# are below `shardwright`.
ROOMS = (
    *("train.errors", "train.units", "train.durable", "train.paths", "train.program"),
    *("train.own_parts", "train.own_files"),
    *("train.run_directory.names",),
    *("train.config", "train.console", "train.charts", "train.optimizer", "train.checkpoint"),
    *("train.run_directory", "train.process", "train.tracking", "train.model", "train.data"),
    *("train.strategy", "train.loop", "train.export", "train.sampling", "train.publishing"),
    "train.diagnosis",
    *("train.plan.facts", "train.plan"),
    *("train.run", "train.replay", "train.evaluate", "train.own_trial", "train.__main__"),
    *("launchers.machine", "launchers.plan", "launchers.translating"),
    *("launchers.composition", "launchers.resumes"),
    *("launchers.messages", "launchers.columns"),
    *("launchers.kinds", "launchers.slurm", "launchers.registry"),
    *("launchers.own_parts", "launchers.preflight"),
    *("launchers.hosts", "launchers.ranks", "launchers.requeue", "launchers.relay"),
    *("launchers.launch", "launchers.dry_run", "launchers.starting", "launchers.resuming"),
    *(
        "launchers.job_end",
        "launchers.runs",
        "launchers.diagnosing",
        "launchers.sweep",
        "launchers.watching",
    ),
    *("launchers.evaluating", "launchers.api", "launchers.notebook"),
    *("launchers.reporting",),
    *("launchers.commands", "launchers.__main__"),
    *("shardwright.__main__", "benchmarks"),
)
HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "datasets"}
"""What takes seconds to import, and is not there for a launcher to need."""
PACKAGES = ("train", "launchers", "shardwright", "benchmarks")
LONGEST_LINES = 70
"""What a function may have, signature and docstring included, as it is to be read at once.

A longer one is divided by what its parts decide.
"""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@dataclass(frozen=True)
class Source:
    """What is asked of a file here; its tree is let go, as thousands of nodes slow what follows."""

    imports: tuple[tuple[str, tuple[str, ...], bool], ...]
    """What is imported, or what of it from it, and whether as soon as the file itself is."""
    functions: tuple[tuple[str, int, int], ...]
    """Each one's name, its first line, and how many it has."""


@cache
def source(path: Path) -> Source:
    tree = ast.parse(path.read_text())
    at_once = {id(node) for statement in tree.body for node in _run_at_once(statement)}
    imports: list[tuple[str, tuple[str, ...], bool]] = []
    functions = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.extend((alias.name, (), id(node) in at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            imports.append((name, tuple(a.name for a in node.names), id(node) in at_once))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            functions.append((node.name, node.lineno, lines))
    return Source(tuple(imports), tuple(functions))


def folder(name: str) -> str:
    """Return the name of an imported module as folders have it."""
    inner = name.removeprefix("shardwright.")
    return inner if inner in modules() else name


@cache
def imported(name: str) -> tuple[tuple[str, bool], ...]:
    """Return what a module imports, and whether that happens as soon as it is imported itself."""
    found = []
    for module, names, is_at_once in source(modules()[name]).imports:
        assert not module.startswith("."), f"{name} imports relatively"
        inner = [folder(f"{module}.{part}") for part in names] or [folder(module)]
        found += [(i if i in modules() else folder(module), is_at_once) for i in inner]
    return tuple(found)


def _run_at_once(statement: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
        return
    if isinstance(statement, ast.FunctionDef):
        return
    yield statement
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt):
            yield from _run_at_once(child)


@cache
def arrows(name: str) -> frozenset[str]:
    """Return the project's own modules that a module imports, in whatever way.

    But for the package that holds all of them, and is there before any of them is.
    """
    own = modules().keys() - {"shardwright"}
    return frozenset(found for found, _ in imported(name) if found in own and found != name)


def room(name: str) -> str | None:
    """Return the room that a module is in; None for what a package says of itself."""
    fitting = [r for r in ROOMS if name == r or name.startswith(f"{r}.")]
    return max(fitting, key=len) if fitting else None


def test_no_circle_of_imports() -> None:
    try:
        list(graphlib.TopologicalSorter({name: arrows(name) for name in modules()}).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(error.args[1][::-1]))


def test_every_module_is_in_a_room() -> None:
    assert {name for name in modules() if room(name) is None} <= set(PACKAGES)


def test_rooms_import_only_from_those_above_them() -> None:
    wrong = [
        f"{name} imports {other}, which is below it"
        for name in modules()
        for other in arrows(name)
        if room(name) and room(other) and ROOMS.index(room(name)) < ROOMS.index(room(other))
    ]
    assert not wrong, "\n".join(wrong)


LIGHT = [n for n in modules() if n.partition(".")[0] in ("launchers", "shardwright")]


@pytest.mark.parametrize("name", LIGHT)
def test_a_launcher_imports_nothing_heavy(name: str) -> None:
    seen, left = {name}, [name]
    while left:
        here = left.pop()
        for found, is_at_once in imported(here):
            if not is_at_once:
                continue
            parts = found.split(".")
            assert parts[0] not in HEAVY, f"{here}, which {name} imports, imports {found}"
            for end in range(1, len(parts) + 1):  # a module's packages are imported too
                part = ".".join(parts[:end])
                if part in modules() and part not in seen:
                    seen.add(part)
                    left.append(part)


def test_everything_is_imported_by_the_name_that_it_has_where_it_is_installed() -> None:
    """By a folder's own name a second copy of a module would come, whose classes are others."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in (*PACKAGES, "docs", "tests")
        for path in sorted((ROOT / package).rglob("*.py"))
        for name, _, _ in source(path).imports
        if name.partition(".")[0] in ("train", "launchers", "conf", "slurm")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_test_imports_from_another() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name, parts, _ in source(path).imports
        if parts and any(part.startswith("test_") for part in name.split("."))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", [*PACKAGES, "docs", "tests"])
def test_no_function_is_longer_than_is_read_at_once(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    too_long = [
        f"{path.relative_to(ROOT)}:{first_line} {name} has {lines} lines"
        for path in paths
        for name, first_line, lines in source(path).functions
        if lines > LONGEST_LINES
    ]
    assert not too_long, f"over {LONGEST_LINES} lines: " + "; ".join(too_long)
