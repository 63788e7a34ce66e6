"""A disk that is not there is said before anything starts, and a run leaves nothing on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.unit.strategy.test_settings import ZERO3, config
from train.config import RunConfig, ZeroStrategy
from train.strategy import nvme


def on_disk(path: Path) -> RunConfig:
    return config(
        strategy={**ZERO3, "offload_optimizer": "nvme", "nvme_path": str(path)},
        run_dir=str(path / "run"),
    )


def problems(path: Path) -> str:
    strategy = on_disk(path).strategy
    assert isinstance(strategy, ZeroStrategy)
    return "\n".join(nvme.problems(strategy))


def test_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    assert (
        f"strategy.nvme_path={tmp_path / 'nvme'} does not exist on this machine, and is not made, "
        "lest a disk that is not mounted fill another; mount the disk, make the directory or name "
        "another" in problems(tmp_path / "nvme")
    )
    assert not (tmp_path / "nvme").exists()


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "nvme").touch()
    assert "nvme is not a directory on this machine" in problems(tmp_path / "nvme")


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_directory_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o555)
    assert "theirs may not be written to; change its permissions" in problems(tmp_path / "theirs")


def test_no_libaio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install g++ libaio-dev" in problems(tmp_path)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_compiler_without_libaio_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFLAGS", "-nostdinc")
    assert "libaio" in problems(tmp_path)


def test_the_folder_of_a_run_goes_and_the_disk_stays(tmp_path: Path) -> None:
    run = on_disk(tmp_path)
    folder = nvme.directory(run)
    assert folder is not None
    assert folder.parent == tmp_path
    (folder / "zero_stage_3").mkdir(parents=True)
    nvme.discard(run)
    assert list(tmp_path.iterdir()) == []
