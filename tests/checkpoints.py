"""Checkpoints for tests: small ones made by hand, and the ways in which files get damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwright.train.checkpoint.format import layout

FILES = ("engine/shard-0.pt", "engine/shard-1.pt", "rng-0.pt", "trainer_state.json")


def described(directory: Path) -> dict[str, dict[str, Any]]:
    """Return what a manifest says of each file below a directory."""
    return {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "xxh3_128": layout.hash_file(path),
        }
        for path in layout.files_of(directory)
    }


def write_checkpoint(directory: Path, step: int, **manifest: Any) -> Path:
    """Publish a checkpoint of a few files, whose sizes are the same at every step."""
    temporary = directory / f".checkpoint-{step}.tmp"
    for name in FILES:
        path = temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%s of step %08d" % (name.encode(), step))
    layout.write_manifest(temporary, {"step": step, "files": described(temporary), **manifest})
    final = directory / f"checkpoint-{step}"
    layout.publish_checkpoint(temporary, final)
    return final


# --- what happens to one file; each is given it and the same file of another checkpoint -----------


def flip_first_bit(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def flip_last_bit(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80
    path.write_bytes(content)


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def make_a_directory(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def add_a_sibling(path: Path, other: Path) -> None:
    path.with_name(f"{path.name}.more").write_bytes(path.read_bytes())


FILE_DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    damage.__name__: damage
    for damage in (
        *(flip_first_bit, flip_last_bit, truncate, empty, lengthen, remove, swap),
        *(make_a_directory, add_a_sibling),
    )
}


# --- what happens to a manifest ------------------------------------------------------------------


def _with(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: {**manifest, **values}


def _first_file(**values: Any) -> Callable[[dict[str, Any]], Any]:
    def change(manifest: dict[str, Any]) -> Any:
        name, entry = next(iter(manifest["files"].items()))
        return {**manifest, "files": {**manifest["files"], name: {**entry, **values}}}

    return change


MANIFEST_DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda manifest: [],
    "a number": lambda manifest: 7,
    "null": lambda manifest: None,
    "an empty mapping": lambda manifest: {},
    "no files": lambda manifest: {k: v for k, v in manifest.items() if k != "files"},
    "no step": lambda manifest: {k: v for k, v in manifest.items() if k != "step"},
    "no version": lambda manifest: {k: v for k, v in manifest.items() if k != "format_version"},
    "version in words": _with(format_version="1"),
    "a later version": _with(format_version=99),
    "another step": _with(step=123456),
    "step in words": _with(step="five"),
    "files as a list": _with(files=["engine/shard-0.pt"]),
    "files as null": _with(files=None),
    "files left out": _with(files={}),
    "a file as a number": _with(files={"rng-0.pt": 5}),
    "size in words": _first_file(bytes="12"),
    "negative size": _first_file(bytes=-1),
    "size as a fraction": _first_file(bytes=1.5),
    "no hash": _first_file(xxh3_128=None),
    "a short hash": _first_file(xxh3_128="abc"),
    "another hash": _first_file(xxh3_128="0" * 32),
    "strategy in words": _with(strategy="zero2"),
    "world size of nothing": _with(world_size=0),
    "metrics in words": _with(metrics={"eval_loss": "low"}),
}


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the values of a manifest and give it the hash of the new ones."""
    path = checkpoint / layout.MANIFEST
    tree = change(json.loads(path.read_text()))
    if isinstance(tree, dict):
        tree = {**tree, "manifest_xxh3_128": layout.hash_tree(tree)}
    path.write_text(json.dumps(tree))
