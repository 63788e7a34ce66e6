"""The files that a part of the user's own consists of, found without running any of them."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from shardwright.train.own_parts import Part, file_of, hash_of, part

_INSTALLED = {
    Path(path)
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_path(name)) is not None
}


def imported_by(found: Part) -> dict[str, Path]:
    """Return the modules that a part's file imports, they and so on, by their names.

    Those of its own package, and those beside it, but for other packages that are installed, of
    which each has a version. A name that is computed is not seen, and of a file that does not parse
    nothing is. Raises UserError where the part itself is in no file.
    """
    file, module = file_of(found), "" if found.is_path else found.module
    root = file.parents[module.count(".") + (file.name == "__init__.py" and not found.is_path)]
    package = module.partition(".")[0] if root in _INSTALLED else None
    modules: dict[str, Path] = {}
    waiting = [(module, file)]
    while waiting:
        for name in sorted(_imports(*waiting.pop())):
            if package not in (None, name.partition(".")[0]) or name in modules:
                continue
            path = _source_of(name, root)
            if path is not None and path != file:
                modules[name] = path
                waiting.append((name, path))
    return modules


def fingerprint(key: str, text: str) -> dict[str, object]:
    """Return what changes when code of a part does, or another part of its file is named."""
    found = part(key, text)
    others = {name: hash_of(path) for name, path in sorted(imported_by(found).items())}
    return {
        "name": found.name,
        "file": hash_of(file_of(found)),
        **({"imports": others} if others else {}),
    }


def _source_of(module: str, root: Path) -> Path | None:
    """Return the file of a module below a directory; None where none is there."""
    path = root.joinpath(*module.split("."))
    found = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in found if file.is_file()), None)


def _imports(module: str, path: Path) -> set[str]:
    """Return the modules that a module's file may import, and the packages that they are in."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    named = {name for node in ast.walk(tree) for name in _named_by(node, package)}
    return {name.rsplit(".", cut)[0] for name in named for cut in range(name.count(".") + 1)}


def _named_by(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the modules that an import may name: "from a import b" is a, and perhaps a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        kept = parents[: max(len(parents) + 1 - node.level, 0)] if node.level else []
        base = ".".join(filter(None, [*kept, node.module]))
        if base:
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
