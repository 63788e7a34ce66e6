"""A save looks through the directory of checkpoints once, and at each checkpoint in it once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.format.hashed import HashedFolder
from shardwright.train.checkpoint.listing import Listing
from shardwright.train.config import CheckpointConfig
from shardwright.train.loop.saving.peers import Peers, SaveFailed
from shardwright.train.loop.saving.save import Draft, write
from tests.checkpoints import write_checkpoint


class Engine:
    """Writes one file, unless the disk is full."""

    def __init__(self, problem: OSError | None = None) -> None:
        self.problem = problem

    def write(self, folder: HashedFolder) -> None:
        if self.problem is not None:
            raise self.problem
        folder.write("weights", b"1")

    def finish(self, folder: HashedFolder, written: list[Any]) -> None:
        pass


def draft(directory: Path, step: int, problem: OSError | None = None) -> Draft:
    manifest = {"step": step, "finite": True}
    rule = CheckpointConfig(keep_last=2)
    return Draft(directory, step, Engine(problem), {"rng-0.pt": b"2"}, manifest, rule)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Return a directory of three whole checkpoints and all that kills leave behind."""
    directory = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        write_checkpoint(directory, step)
    (directory / "checkpoint-1" / layout.MANIFEST).unlink()  # its deletion was cut short
    killed = directory / ".checkpoint-5.tmp"  # the very step that is saved next
    killed.mkdir()
    (killed / "weights").write_bytes(b"1")
    (directory / ".checkpoint-9.tmp").mkdir()
    (directory / "checkpoint-4").rename(layout.set_aside(directory / "checkpoint-4"))
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_save_looks_once(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: Counter[str] = Counter()

    def counted(sound: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Any = ".") -> Any:
            if not isinstance(path, int):  # rmtree goes by descriptors, from what it removes on
                looked[os.path.relpath(path, checkpoints)] += 1
            return sound(path)

        return look

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", counted(os.listdir))
        patched.setattr(os, "scandir", counted(os.scandir))
        write(draft(checkpoints, 5), Peers(0))
    assert looked["."] == 1
    # Those that stay and the one that goes: each is walked through for files unknown to it.
    assert [looked[f"checkpoint-{step}"] for step in (2, 3)] == [1, 1]
    assert names(checkpoints) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert [step for step, _ in layout.whole_checkpoints(checkpoints)] == [3, 4, 5]


def test_a_save_that_fails_makes_room(checkpoints: Path) -> None:
    full = OSError(28, "No space left on device")
    with pytest.raises(SaveFailed, match="No space left on device"):
        write(draft(checkpoints, 5, full), Peers(0))
    assert names(checkpoints) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_what_is_nowhere_is_empty(tmp_path: Path) -> None:
    assert Listing(tmp_path / "nowhere").named == {}


def test_what_is_listed(checkpoints: Path) -> None:
    (checkpoints / "checkpoint-7").write_bytes(b"")  # no directory
    (checkpoints / "checkpoint-08").mkdir()
    listing = Listing(checkpoints)
    assert list(listing.named) == [1, 2, 3]
    assert listing.temporary == [checkpoints / f".checkpoint-{n}.tmp" for n in (5, 9)]
    assert listing.set_aside == [layout.set_aside(checkpoints / "checkpoint-4")]
    found = [listing.found(step) for step in listing.named]
    assert isinstance(found[0], layout.NotWhole)
    assert str(found[0]) == "it has no manifest"
    assert [m.step for m in found[1:] if isinstance(m, layout.Manifest)] == [2, 3]
