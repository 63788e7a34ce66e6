"""A checkpoint directory: temporary name, manifest last, published by one rename."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from train.durable import flush, publish

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes, in hexadecimal, reading 1 MiB at a time."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def files_of(directory: Path) -> list[Path]:
    """Return every file below a directory but the manifest, sorted."""
    found = (p for p in directory.rglob("*") if p.is_file())
    return sorted(p for p in found if p != directory / MANIFEST)


def describe_files(paths: list[Path], directory: Path) -> dict[str, dict[str, Any]]:
    """Flush files to disk and return each one's size and hash by its relative path."""
    described = {}
    for path in paths:
        flush(path)
        described[path.relative_to(directory).as_posix()] = {
            "bytes": path.stat().st_size,
            "xxh3_128": hash_file(path),
        }
    return described


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the file that makes a checkpoint whole; call it when every other file is flushed."""
    path = directory / MANIFEST
    path.write_text(json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=1) + "\n")
    flush(path)
    for folder in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        flush(folder)


def whole_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every checkpoint that has a valid manifest, oldest first.

    Valid: readable, of a known format, and every file is there with the size it names.
    """
    if not directory.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    named = sorted((int(match[1]), path) for match, path in found if match)
    return [(step, path) for step, path in named if what_is_wrong(path) is None]


def what_is_wrong(checkpoint: Path) -> str | None:
    """Return why a directory is no whole checkpoint, or None where it is one."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        version, files = manifest["format_version"], manifest["files"]
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({error})"
    if version != FORMAT_VERSION:
        return f"its format is version {version}, and this program reads {FORMAT_VERSION}"
    for name, described in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != described["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {described['bytes']}"
    return None


def candidates(directory: Path) -> list[Path]:
    """Return everything that is named as a checkpoint, newest first."""
    if not directory.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return [path for _, path in sorted(((int(m[1]), p) for m, p in found if m), reverse=True)]


def wrong_hash(checkpoint: Path, part: int, parts: int) -> str | None:
    """Hash every ``parts``-th file of a checkpoint, from the ``part``-th on; return what is wrong.

    Call it where `what_is_wrong` is None.
    """
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    for name in sorted(files)[part::parts]:
        try:
            if hash_file(checkpoint / name) != files[name]["xxh3_128"]:
                return f"{name} is not what was written (its hash differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def retain(directory: Path, keep: int) -> list[Path]:
    """Delete all but the newest whole checkpoints; return what was deleted."""
    old = [path for _, path in whole_checkpoints(directory)[:-keep]]
    for path in old:
        # Without its manifest it no longer exists, even if the deletion is cut short.
        (path / MANIFEST).unlink()
        shutil.rmtree(path)
    return old


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Give a temporary sibling to write into; rename it to ``final`` when the block ends well.

    One that has the name already is replaced only then.
    """
    temporary, old = (final.with_name(f".{final.name}.{suffix}") for suffix in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in temporary.rglob("*"):
        flush(path)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    publish(temporary, final)
    shutil.rmtree(old, ignore_errors=True)
