"""Files are hashed as they are written, whoever writes them, and their first error is told."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from shardwright.train.checkpoint.format.hashed import HashedFolder


def assert_hashes_are_real(folder: HashedFolder) -> None:
    assert folder.files == {
        name: {
            "bytes": (folder.path / name).stat().st_size,
            "xxh3_128": xxhash.xxh3_128_hexdigest((folder.path / name).read_bytes()),
        }
        for name in folder.files
    }


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_saves_is_hashed(is_zip: bool, tmp_path: Path) -> None:
    folder, values = HashedFolder(tmp_path), {"large": torch.randn(2**20), "small": torch.ones(3)}
    with folder.create("engine/state.pt") as stream:
        state: Any = stream
        torch.save(values, state, _use_new_zipfile_serialization=is_zip)
    assert_hashes_are_real(folder)
    read = torch.load(tmp_path / "engine" / "state.pt", weights_only=True)
    assert torch.equal(read["large"], values["large"])


def test_small_writes_and_another_name_are_hashed(tmp_path: Path) -> None:
    folder = HashedFolder(tmp_path)
    with folder.create("parts") as stream:
        for part in (b"a", memoryview(b"bc"), bytearray(b"def")):
            stream.write(part)
        assert stream.tell() == 6
    folder.write("deep/below/parts", b"abc")
    folder.write("name.tmp", b"x" * 1000)
    folder.rename("name.tmp", "name")
    assert set(folder.files) == {"parts", "deep/below/parts", "name"}
    assert (tmp_path / "parts").read_bytes() == b"abcdef"
    assert_hashes_are_real(folder)


def test_a_full_disk_is_what_is_told_and_not_what_torch_makes_of_it(tmp_path: Path) -> None:
    (tmp_path / "state.pt").symlink_to("/dev/full")
    folder, full = HashedFolder(tmp_path), {"weights": torch.ones(2**20)}

    def save() -> None:
        with folder.create("state.pt") as stream:
            state: Any = stream
            torch.save(full, state)

    with pytest.raises(OSError, match="No space left on device") as caught:
        save()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "state.pt")
    assert folder.files == {}


def test_a_vanished_folder_is_not_made_anew(tmp_path: Path) -> None:
    folder = HashedFolder(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        folder.write("engine/state.pt", b"")
    assert list(tmp_path.iterdir()) == []
