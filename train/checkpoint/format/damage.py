"""What is wrong with the files of a model directory, in one line that says what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from shardwright.train.checkpoint.format.lazy import Unreadable
from shardwright.train.checkpoint.read import plain as read_plain

TOKENIZER = "tokenizer.json"

_LFS = b"version https://git-lfs.github.com/spec/"
_LOOKED_AT = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")


def explained(path: Path, error: Exception) -> str:
    """Return why reading a directory or a file has failed: what is wrong with it, or the error."""
    return next(problems(path), None) or in_one_line(error)


def in_one_line(error: Exception) -> str:
    """Return the first line of an error, with its kind where the line does not say enough."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ValueError | OSError) and lines:
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def problems(path: Path) -> Iterator[str]:
    """Yield what is wrong with each file of a directory, or with one file. Reads no weights."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix in _LOOKED_AT and file.is_file() and (found := problem(file)):
            yield found


def problem(file: Path) -> str | None:
    """Return what is wrong with a file of a model, None where nothing is seen."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS))
        if start == _LFS:
            return (
                f"{file} is a pointer of git-lfs ({file.stat().st_size} bytes) in place of the "
                "file; run `git lfs pull` in its directory, or download the file itself"
            )
        if not start and file.suffix not in (".txt", ".py"):
            return f"{file} is empty; {_AGAIN}"
        if file.suffix == ".safetensors":
            read_plain.read(file)
        elif file.name == TOKENIZER:
            return tokenizer_problem(file)
        elif file.suffix == ".json":
            tree = json.loads(file.read_bytes())
            if file.name.endswith(".index.json") and "weight_map" in tree:
                return _missing_part(file, set(map(str, tree["weight_map"].values())))
    except Unreadable as error:
        return f"{error}; {_AGAIN}"
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        return f"{file} cannot be read ({in_one_line(error)}); {_AGAIN}"
    return None


_AGAIN = "copy or download it again"


def tokenizer_problem(file: Path) -> str | None:
    """Return why the installed tokenizers does not read a tokenizer.json, None where it does."""
    try:
        tree = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{file} is truncated or not JSON ({in_one_line(error)}); {_AGAIN}"
    try:
        tokenizers.Tokenizer.from_str(json.dumps(tree))
    except Exception as error:  # tokenizers raises nothing else
        version = tree.get("version") if isinstance(tree, dict) else None
        reason = " ".join(str(error).split())
        return (
            f"{file} (format {version!r}) is not what tokenizers {tokenizers.__version__} reads "
            f"({reason}); install the version of tokenizers that wrote it, or save it again with "
            "this one"
        )
    return None


def _missing_part(index: Path, names: set[str]) -> str | None:
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if not missing:
        return None
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"{index} names {missing[0]}{more}, which is not there; {_AGAIN}"
