"""A checkpoint exists only once its manifest is valid."""

import json
from pathlib import Path

import pytest

from shardwright.train.checkpoint.format import layout
from shardwright.train.durable import atomic_directory
from tests.checkpoints import described


def write_checkpoint(directory: Path, step: int) -> Path:
    temporary = directory / f".checkpoint-{step}.tmp"
    (temporary / "engine").mkdir(parents=True)
    (temporary / "engine" / "shard.pt").write_bytes(b"weights of step %d" % step)
    files = described(temporary)
    layout.write_manifest(temporary, {"step": step, "files": files})
    final = directory / f"checkpoint-{step}"
    layout.publish_checkpoint(temporary, final)
    return final


def test_published_checkpoints_are_found_oldest_first(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path, step) for step in (9, 10, 100)]
    assert layout.whole_checkpoints(tmp_path) == list(zip((9, 10, 100), paths, strict=True))


def test_a_temporary_directory_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-5.tmp").mkdir()
    (tmp_path / "checkpoint-5.tmp").mkdir()
    assert layout.whole_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / "manifest.json").unlink(), "it has no manifest"),
        (lambda c: (c / "manifest.json").write_text(""), "its manifest cannot be read"),
        (lambda c: (c / "manifest.json").write_text("[]"), "its manifest cannot be read"),
        (lambda c: (c / "engine/shard.pt").unlink(), "engine/shard.pt is missing"),
        (lambda c: (c / "engine/shard.pt").write_bytes(b"w"), "engine/shard.pt has 1 bytes"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_reason(tmp_path: Path, damage, reason) -> None:
    whole, damaged = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    damage(damaged)
    assert layout.whole_checkpoints(tmp_path) == [(1, whole)]
    assert reason in (layout.what_is_wrong(damaged) or "")


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    assert layout.what_is_wrong(checkpoint) == (
        "its format is version 99, and this program reads 1"
    )


def test_a_second_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 1)
    (first / "engine" / "shard.pt").write_bytes(b"damaged by then")
    assert write_checkpoint(tmp_path, 1) == first
    assert layout.verify(first) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_interrupted_directory_gets_no_name(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_directory(tmp_path / "final") as directory:
            (directory / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not (tmp_path / "final").exists()
    with atomic_directory(tmp_path / "final") as directory:
        assert list(directory.iterdir()) == []
    assert (tmp_path / "final").is_dir()


def test_a_directory_that_is_there_already_is_replaced(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic_directory(tmp_path / "final") as directory:
            (directory / text).write_text(text)
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
