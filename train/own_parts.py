"""A function or class of the user's own, by a config's text of it: found, looked at, imported.

The text is file.py:NAME or package.module:NAME. No torch here; what is imported may bring it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.train.errors import UserError
from shardwright.train.paths import absolute


class Part(NamedTuple):
    """Where a part is, by a config's text of it."""

    key: str
    """The field of the config that names it."""
    module: str
    """A path that ends in .py, or the name of an installed module."""
    name: str

    @property
    def is_path(self) -> bool:
        return self.module.endswith(".py")

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"

    def wrong(self, what: str) -> UserError:
        """Return the error that says what is wrong with it."""
        return UserError(f"{self.key}={self}: {what}")


def part(key: str, text: str) -> Part:
    """Return what "package.module:NAME" or "path/file.py:NAME" names. Raises UserError. Pure."""
    module, colon, name = text.rpartition(":")
    if not colon or not module or not name.isidentifier():
        raise UserError(
            f"{key}={text} names no function or class; say file.py:NAME or package.module:NAME"
        )
    return Part(key, module, name)


def located(key: str, text: str) -> str:
    """Return the same part by a text that means it from any directory.

    A module that is not installed, and lies in the working directory, becomes its file's path.
    """
    found = part(key, text)
    if found.is_path:
        return str(found._replace(module=absolute(found.module)))
    beside = Path.cwd() / f"{found.module}.py"
    if found.module.isidentifier() and _spec(found.module) is None and beside.is_file():
        return str(found._replace(module=str(beside)))
    return text


def file_of(found: Part) -> Path:
    """Return the file that a part is in; nothing is imported. Raises UserError where none is."""
    if found.is_path:
        path = Path(found.module)
        if not path.is_file():
            raise found.wrong(f"{path} is not there; give the path of a Python file")
        return path
    spec = _spec(found.module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise found.wrong(
            f"there is no module {found.module}; install it, set PYTHONPATH to the directory that "
            "holds it, or give the path of a Python file"
        )
    return Path(spec.origin)


def check(key: str, text: str) -> None:
    """Raise UserError where a file has no such part, as far as shows without running it."""
    found = part(key, text)
    path = file_of(found)
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise found.wrong(f"{path}, line {error.lineno}: {error.msg}") from None
    bound = {name for node in ast.walk(tree) for name in _bound_by(node)}
    if found.name not in bound and "*" not in bound:
        raise found.wrong(f"{path} has no {found.name}; name a function or class of it")


def hash_of(path: Path) -> str:
    """Return what changes when a file does."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def imported(found: Part) -> Any:
    """Return the part itself; raise what its module raises, or AttributeError, or TypeError.

    A file is imported once in a process, however many parts of it are named.
    """
    if not found.is_path:
        return _callable(importlib.import_module(found.module), found.name)
    path = os.path.abspath(found.module)
    name = f"own_parts_{hashlib.blake2b(path.encode(), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return _callable(sys.modules[name], found.name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if (beside := os.path.dirname(path)) not in sys.path:
        sys.path.append(beside)  # behind all that is installed, which libraries import later
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return _callable(module, found.name)


def load(key: str, text: str) -> Any:
    """Return the part itself. Raises UserError, which says what was raised and where."""
    found = part(key, text)
    file_of(found)
    try:
        return imported(found)
    except Exception as error:  # whatever code of the user's raises
        raise found.wrong(f"it cannot be imported: {said(error)}") from error


def said(error: BaseException) -> str:
    """Return an error in a line, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename][-1:]
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    return text + "".join(f" ({frame.filename}, line {frame.lineno})" for frame in own)


def _callable(module: Any, name: str) -> Any:
    found = getattr(module, name)
    if not callable(found):
        raise TypeError(f"{name} is {type(found).__name__}, and is not called")
    return found


def _spec(module: str) -> ModuleSpec | None:
    """Return where a module is, without the import of the packages that it is in."""
    places: Any = None
    spec = None
    names = module.split(".")
    for count in range(1, len(names) + 1):
        full = ".".join(names[:count])
        try:
            found = (finder.find_spec(full, places) for finder in sys.meta_path)
            spec = next((each for each in found if each is not None), None)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        places = spec.submodule_search_locations or []
    return spec


def _bound_by(node: ast.AST) -> Iterator[str]:
    """Yield the names that a statement of a module gives to something."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
