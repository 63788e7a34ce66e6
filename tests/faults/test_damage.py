"""Before a damaged checkpoint is gone on from, the damage is found, and the one before is taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.train.checkpoint.format import layout
from shardwright.train.errors import UserError
from shardwright.train.loop import resuming
from shardwright.train.process.rank import Rank
from tests.faults.killable import start

pytestmark = pytest.mark.distributed

RunOf = Callable[[str], Path]
ALONE = Rank(index=0, local_index=0, world_size=1)


def flip(file: Path, older: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def truncate(file: Path, older: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path, older: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path, older: Path) -> None:
    file.unlink()


def swap(file: Path, older: Path) -> None:
    file.write_bytes(older.read_bytes())


DAMAGES = [flip, truncate, empty, remove, swap]
DAMAGES_TO_A_MANIFEST = [empty, remove, swap]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(
    strategy: str, run_of: RunOf
) -> None:
    run_dir = run_of(strategy)
    older, newest = (run_dir / "checkpoints" / f"checkpoint-{step}" for step in (1, 2))
    for sound in [*layout.files_of(newest), newest / layout.MANIFEST]:
        name = sound.relative_to(newest)
        data = sound.read_bytes()
        is_manifest = name.name == layout.MANIFEST
        for damage in DAMAGES_TO_A_MANIFEST if is_manifest else DAMAGES:
            if (damage is swap and (older / name).read_bytes() == data) or not data:
                continue
            damage(sound, older / name)
            said: list[str] = []
            found = resuming.newest(run_dir, ALONE, said.append)
            assert found is not None
            assert found.checkpoint == older, f"{damage.__name__} of {name} is not found"
            (text,) = said
            assert text.startswith("checkpoint-2 is not whole: ")
            assert is_manifest or name.as_posix() in text
            sound.write_bytes(data)
    found = resuming.newest(run_dir, ALONE, pytest.fail)
    assert found is not None
    assert found.checkpoint == newest


def test_nothing_to_go_on_from_is_an_error(run_of: RunOf) -> None:
    run_dir = run_of("fsdp")
    (run_dir / "checkpoints/checkpoint-1/rng-1.pt").unlink()
    (run_dir / "checkpoints/checkpoint-2/manifest.json").write_bytes(b"")
    with pytest.raises(UserError) as error:
        resuming.newest(run_dir, ALONE, lambda text: None)
    assert "has checkpoints, but none to resume from" in str(error.value)
    assert "checkpoint-2 is not whole: its manifest cannot be read" in str(error.value)
    assert "checkpoint-1 is not whole: rng-1.pt is missing" in str(error.value)
    assert "restore one of them from a copy, or start a new run" in str(error.value)


@pytest.mark.parametrize(
    ("strategy", "file", "damage"),
    [
        ("ddp", "engine/.metadata", remove),
        pytest.param("zero2", "rng-1.pt", flip, marks=pytest.mark.slow),
        ("zero3", "engine/*zero_pp_rank_1_mp_rank_00_optim_states.pt", swap),
        pytest.param("fsdp", "engine/__1_0.distcp", truncate, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_run_goes_on_from_before_and_ends_with_the_same_bits(
    strategy: str, file: str, damage: Callable[[Path, Path], None], run_of: RunOf
) -> None:
    run_dir = run_of(strategy)
    whole = start(run_dir)
    assert whole.exit_codes == [0, 0]
    assert "resuming from checkpoint-2" in whole.console
    final = run_dir / "final/model.safetensors"
    expected = final.read_bytes()
    shutil.rmtree(run_dir / "final")

    (damaged,) = run_dir.glob(f"checkpoints/checkpoint-2/{file}")
    damage(damaged, next(run_dir.glob(f"checkpoints/checkpoint-1/{file}")))
    ended = start(run_dir)
    assert ended.exit_codes == [0, 0], ended
    name = damaged.relative_to(run_dir / "checkpoints/checkpoint-2").as_posix()
    assert f"checkpoint-2 is not whole: {name} " in ended.console
    assert "resuming from checkpoint-1\n" in ended.console
    assert final.read_bytes() == expected
    assert layout.what_is_wrong(run_dir / "checkpoints/checkpoint-2") is None


def test_a_run_with_no_whole_checkpoint_ends_with_exit_code_2(run_of: RunOf) -> None:
    run_dir = run_of("ddp")
    for manifest in run_dir.glob("checkpoints/*/manifest.json"):
        manifest.write_bytes(b"")
    ended = start(run_dir)
    assert 2 in ended.exit_codes
    assert "has checkpoints, but none to resume from" in ended.console
    assert not (run_dir / "final").exists()
