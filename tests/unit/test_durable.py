"""A small file is the old one or the new one, whenever the power fails; and one place writes it."""

from __future__ import annotations

import ast
import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.train.durable import write_text

ROOT = Path(__file__).resolve().parents[2]


def test_text_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "note.json", []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        where = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        text = where.read_text() if where.is_file() else None
        calls.append(("sync", where.parent == tmp_path, text))
        real_sync(descriptor)

    def rename(old: Path, new: Path) -> None:
        calls.append(("rename", Path(old).parent == new.parent, new.name))
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    write_text(path, "ein Wörtchen\n")
    assert calls == [
        ("sync", True, "ein Wörtchen\n"),
        ("rename", True, "note.json"),
        ("sync", False, None),
    ]
    assert path.read_bytes() == "ein Wörtchen\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_kill_before_the_rename_leaves_the_old_text(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "note.json"
    write_text(path, "old")
    program = (
        "import os, pathlib, signal, shardwright.train.durable\n"
        f"os.{moment} = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"shardwright.train.durable.write_text(pathlib.Path({str(path)!r}), 'new')\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    left = [other.name for other in tmp_path.iterdir() if other != path]
    assert len(left) == 1, "it was not under way"
    assert left[0].startswith("."), "nothing that looks for files by their names takes it for one"
    write_text(path, "newer")
    assert path.read_text() == "newer"


def test_a_full_disk_is_told_of_the_file_that_was_meant_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note.json"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="note.json'") as raised:
        write_text(path, "new")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="nowhere/note.json'"):
        write_text(tmp_path / "nowhere" / "note.json", "new")


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    path, other = tmp_path / "note.json", tmp_path / "other"
    path.touch(0o400)
    before = os.umask(0o027)
    try:
        write_text(path, "new")
        other.write_text("")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(file.stat().st_mode) for file in (path, other)]
    assert modes == [0o640, 0o640]


STAGED = "in a directory that is synced and gets its name once all is in it"
ELSEWHERE = {
    "train/checkpoint/format/layout.py:write_manifest": STAGED,
    "train/data/sources/download.py:download": STAGED,
    "train/data/tokens/cache.py:_build": STAGED,
    "train/data/tokens/duplicates.py:__enter__": STAGED,
    "train/data/tokens/fitting.py:write_rows": STAGED,
    "train/data/tokens/packing.py:join_unique": STAGED,
    "train/data/tokens/shards.py:make": STAGED,
    "train/data/tokens/store.py:create": STAGED,
    "train/export/card.py:write": STAGED,
    "train/export/recover.py:write": STAGED,
    "train/export/safetensors.py:__init__": STAGED,
    "train/model/origin.py:_publish": STAGED,
    "train/checkpoint/format/hashed.py:create": "it hashes what it writes, and syncs it",
    "launchers/commands/inspect.py:_inspected": "in a directory that does not stay",
    "launchers/commands/prepare.py:_prepared_here": "in a directory that does not stay",
    "launchers/reporting/pictures.py:write": "it is drawn again in a second",
    "train/console/progress.py:_note": "what it says is out of date in a second",
    "train/plan/comparison.py:begun": "a setting of the kernel's",
    "train/process/stop_request.py:watch_for_stop": "others have it open, and write into it",
    "train/tracking/tensorboard.py:__init__": "TensorBoard's own file, which grows",
}
"""Who makes a file without `write_text`, and why."""


def test_nothing_else_writes_a_small_file() -> None:
    found = set()
    for path in [*(ROOT / "train").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")]:
        if path == ROOT / "train" / "durable.py":
            continue
        found |= {f"{path.relative_to(ROOT)}:{name}" for name in _writers(path)}
    assert found == set(ELSEWHERE)


def test_a_writer_is_seen() -> None:
    writes = ("path.write_text(text)", "os.replace(a, b)", "open(path, mode='w')", "p.open('xb')")
    reads = ("write_text(path, text)", "path.read_text()", "p.open('rb')", "os.open(p, flags)")
    calls = [ast.parse(text, mode="eval").body for text in writes + reads]
    assert [_writes(c) for c in calls if isinstance(c, ast.Call)] == [True] * 4 + [False] * 4


def _writers(path: Path) -> set[str]:
    """Return the functions of a module that make or replace a file by themselves."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inner = {node: f.name for f in functions for node in ast.walk(f)}  # the innermost comes last
    return {inner.get(n, "") for n in ast.walk(tree) if isinstance(n, ast.Call) and _writes(n)}


def _writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name == "os.replace" or name.endswith((".write_text", ".write_bytes")):
        return True
    if name.rpartition(".")[2] != "open" or name == "os.open":
        return False
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    texts = [node.value for node in given if isinstance(node, ast.Constant)]
    modes = [text for text in texts if isinstance(text, str) and set(text) <= set("wxbt+")]
    return any(set(mode) & set("wx") for mode in modes)
