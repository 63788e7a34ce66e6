"""Python code that a model brings along: which files it is, and loading it safely among ranks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_cached_module_file, get_relative_import_files
from transformers.utils import HF_MODULES_CACHE

FLAG = "--trust-remote-code"
AUTO_MAP = "auto_map"
"""Names the classes of such a model in its config.json: {"AutoConfig": "module.Class", ...}."""
AUTO_CLASSES = {
    "clm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "diffusion": "AutoModelForMaskedLM",
    "span_corruption": "AutoModelForSeq2SeqLM",
}
"""Under which an objective's class stands there."""


def classes(config_json: Mapping[str, Any]) -> dict[str, str]:
    """Return which of a model's classes its own code has, as [REPOSITORY--]MODULE.CLASS. Pure."""
    found = config_json.get(AUTO_MAP)
    entries = found.items() if isinstance(found, dict) else ()
    return {str(k): v for k, v in entries if isinstance(v, str) and "." in v}


def names(config_json: Mapping[str, Any]) -> str:
    """Return the files that hold those classes, for a message. Pure."""
    modules = {ref.rpartition("--")[2].partition(".")[0] for ref in classes(config_json).values()}
    return ", ".join(f"{module}.py" for module in sorted(modules))


def own(config_json: Mapping[str, Any]) -> dict[str, str]:
    """Return those classes as they are named where the code lies beside config.json. Pure."""
    return {key: ref.rpartition("--")[2] for key, ref in classes(config_json).items()}


def beside(directory: Path, config_json: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files of a model's code that lie in its directory, by their relative paths.

    Reads them, to follow their imports, and runs nothing.
    """
    found: dict[str, Path] = {}
    for reference in own(config_json).values():
        module = directory / f"{reference.partition('.')[0]}.py"
        if module.is_file():
            found |= _with_imports(module, directory)
    return dict(sorted(found.items()))


def missing(files: Iterable[str], config_json: Mapping[str, Any], key: str) -> str | None:
    """Return the file that has the class of ``key``, or the config's, where it is not there."""
    for name in ("AutoConfig", key):
        if reference := own(config_json).get(name):
            file = f"{reference.partition('.')[0]}.py"
            if file not in files:
                return file
    return None


def fetched(name: str, revision: str | None, config_json: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files of a model's code by their relative paths, wherever they lie.

    ``name`` is a directory, or a model of the hub. What cannot be had is left out.
    """
    found = beside(Path(name), config_json) if Path(name).is_dir() else {}
    for reference in classes(config_json).values():
        repository, _, local = reference.rpartition("--")
        file = f"{local.partition('.')[0]}.py"
        if file in found or (not repository and Path(name).is_dir()):
            continue
        of_model = repository in ("", name)
        try:
            cached = get_cached_module_file(
                repository or name, file, revision=revision if of_model else None
            )
        except (OSError, ValueError, ImportError):
            continue
        module = Path(HF_MODULES_CACHE) / cached
        found |= _with_imports(module, module.parents[len(Path(file).parts) - 1])
    return dict(sorted(found.items()))


def _with_imports(module: Path, root: Path) -> dict[str, Path]:
    files = [module, *map(Path, get_relative_import_files(module))]
    return {file.relative_to(root).as_posix(): file for file in files if file.is_file()}


_depth = 0


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Keep this node's other processes from loading such code inside of the block.

    transformers copies it into one folder for all and imports it from there: a process could read
    a file that another is about to write (5.23, `get_cached_module_file`).
    """
    global _depth
    descriptor = None
    if _depth == 0:
        try:
            os.makedirs(HF_MODULES_CACHE, exist_ok=True)
            descriptor = os.open(HF_MODULES_CACHE, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if descriptor is not None:
            os.close(descriptor)
