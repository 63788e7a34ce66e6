"""A disk that is not there is said before anything starts, and a run leaves nothing on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shardwright.train.config import RankLayout, RunConfig, ZeroStrategy
from shardwright.train.errors import UserError
from shardwright.train.strategy.zero import nvme, swapped
from tests.unit.strategy.configs import config
from tests.unit.trees import ZERO3


def on_disk(path: Path, **fields: object) -> RunConfig:
    return config(
        strategy={**ZERO3, "offload_optimizer": "nvme", "nvme_path": str(path), **fields},
        run_dir=str(path / "run"),
    )


def problems(path: Path, device: str = "cpu") -> str:
    strategy = on_disk(path).strategy
    assert isinstance(strategy, ZeroStrategy)
    return "\n".join(nvme.problems(strategy, device))


def test_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    assert (
        f"strategy.nvme_path={tmp_path / 'nvme'} does not exist on this machine, and is not "
        "created, so that a disk that is not mounted does not fill another one; mount the disk, "
        "create the directory or name another" in problems(tmp_path / "nvme")
    )
    assert not (tmp_path / "nvme").exists()


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "nvme").touch()
    assert "nvme is not a directory on this machine" in problems(tmp_path / "nvme")


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_directory_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o555)
    assert "theirs is not writable; change its permissions" in problems(tmp_path / "theirs")


def test_no_libaio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install g++ libaio-dev" in problems(tmp_path)


def test_no_cuda_toolkit_is_an_error_on_a_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvme, "CUDA_DEFAULT_HOME", str(tmp_path / "cuda"))
    assert "CUDA_HOME" not in problems(tmp_path)
    assert "install the toolkit and set CUDA_HOME, or offload to cpu" in problems(tmp_path, "cuda")
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert "CUDA_HOME" not in problems(tmp_path, "cuda")


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


def test_a_buffer_that_holds_no_part_of_a_parameter(tmp_path: Path) -> None:
    run = on_disk(tmp_path, offload_parameters="nvme", nvme_buffer_elements=1000)
    nvme.check_model(run, {"small": 10, "wte.weight": 2000}, RankLayout(shards=2))
    with pytest.raises(
        UserError,
        match=r"strategy.nvme_buffer_elements=1,000 is too small for a rank's part of "
        r"wte.weight, which has 1,001 elements; raise it to that",
    ):
        nvme.check_model(run, {"small": 10, "wte.weight": 2001}, RankLayout(shards=2))


def test_a_disk_that_is_too_full(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    run = on_disk(tmp_path)
    nvme.check_model(run, {"weight": free // 32}, RankLayout())
    with pytest.raises(
        UserError, match=rf"strategy.nvme_path={tmp_path} has [\d.,]+ GB free, and .* takes .* GB"
    ):
        nvme.check_model(run, {"weight": free}, RankLayout())


def test_what_a_killed_run_left_on_the_disk_is_no_lack_of_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    run = on_disk(tmp_path)
    folder = nvme.directory(run)
    assert folder is not None
    (folder / "rank0").mkdir(parents=True)
    (folder / "rank0" / "0_1.tensor.swp").write_bytes(b"x" * 2**20)
    (folder / "rank0" / "gone.tensor.swp").symlink_to("another rank removed it")
    nvme.check_model(run, {"weight": 2**16}, RankLayout())
    with pytest.raises(UserError, match="choose a larger disk"):
        nvme.check_model(run, {"weight": 2**17}, RankLayout())


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 512, [(0, 512)]),
        (0, 600, [(0, 512), (512, 88)]),
        (100, 600, [(0, 156), (156, 256), (412, 188)]),
        (100, 156, [(0, 156)]),
        (100, 20, [(0, 20)]),
        (256, 20, [(0, 20)]),
    ],
)
def test_a_gradient_is_cut_where_a_disk_can_begin_and_end(
    offset: int, length: int, expected: list[tuple[int, int]]
) -> None:
    assert swapped.sections(offset, length, alignment=256) == expected
