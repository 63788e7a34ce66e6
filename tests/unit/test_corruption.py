"""Whatever happens to a file of a checkpoint is found, and the one before it is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shardwright.train.checkpoint import discovery
from shardwright.train.checkpoint.choose import choose
from shardwright.train.checkpoint.discovery import newest_whole
from shardwright.train.checkpoint.format import layout
from shardwright.train.errors import UserError
from tests.checkpoints import (
    FILE_DAMAGES,
    FILES,
    MANIFEST_DAMAGES,
    rewrite_manifest,
    write_checkpoint,
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 5)


def assert_passed_over(damaged: Path, older: Path) -> str:
    """Check that the older one is chosen; return what is said of the damaged one."""
    problems = layout.verify(damaged)
    assert problems
    chosen, passed_over = newest_whole(older.parent)
    assert chosen == older
    # Of several unknown files the sizes alone tell in one line.
    first = problems[0].removesuffix(" is not in its manifest")
    assert [(p.step, p.problems[0].startswith(first)) for p in passed_over] == [(5, True)]
    return str(passed_over[0])


def test_the_newest_is_chosen_where_nothing_is_wrong(pair: tuple[Path, Path]) -> None:
    assert newest_whole(pair[0].parent) == (pair[1], [])
    assert [layout.verify(path) for path in pair] == [[], []]


@pytest.mark.parametrize("damage", FILE_DAMAGES)
@pytest.mark.parametrize("file", [*FILES, layout.MANIFEST])
def test_a_damaged_file_is_found(pair: tuple[Path, Path], file: str, damage: str) -> None:
    older, newest = pair
    FILE_DAMAGES[damage](newest / file, older / file)
    text = assert_passed_over(newest, older)
    assert text.startswith("checkpoint-5 is not whole: ")
    assert (file if file != layout.MANIFEST else "manifest") in text


def test_no_bit_of_a_manifest_flips_unnoticed(pair: tuple[Path, Path]) -> None:
    path = pair[1] / layout.MANIFEST
    sound = path.read_bytes()
    for bit in range(0, 8 * len(sound), 7):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if layout.what_is_wrong(pair[1]) is None:  # one blank for another
            assert json.loads(flipped) == json.loads(sound)


@pytest.mark.parametrize("damage", MANIFEST_DAMAGES)
def test_a_manifest_of_wrong_values_is_found(pair: tuple[Path, Path], damage: str) -> None:
    older, newest = pair
    rewrite_manifest(newest, MANIFEST_DAMAGES[damage])
    assert_passed_over(newest, older)


@pytest.mark.parametrize("name", ["../checkpoint-4/rng-0.pt", "/etc/passwd", "engine/../rng-0.pt"])
def test_a_manifest_that_points_elsewhere_is_refused(pair: tuple[Path, Path], name: str) -> None:
    older, newest = pair
    rewrite_manifest(newest, lambda m: {**m, "files": {**m["files"], name: m["files"]["rng-0.pt"]}})
    assert "is not a path inside the checkpoint" in assert_passed_over(newest, older)


def test_all_files_of_another_checkpoint_are_that_checkpoint(pair: tuple[Path, Path]) -> None:
    older, newest = pair
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    assert assert_passed_over(newest, older) == (
        "checkpoint-5 is not whole: its manifest is that of step 4"
    )


def test_every_bad_file_is_reported(pair: tuple[Path, Path]) -> None:
    older, newest = pair
    for file, damage in zip(FILES, ("swap", "truncate", "remove", "add_a_sibling"), strict=True):
        FILE_DAMAGES[damage](newest / file, older / file)
    was = json.loads((newest / layout.MANIFEST).read_text())["files"][FILES[0]]["xxh3_128"]
    is_now = layout.hash_file(older / FILES[0])
    bytes_before = len((older / FILES[1]).read_bytes())
    assert sorted(layout.verify(newest)) == sorted(
        [
            f"{FILES[0]} has the hash {is_now} instead of {was}",
            f"{FILES[1]} has {bytes_before - 1} bytes instead of {bytes_before}",
            f"{FILES[2]} is missing",
            f"{FILES[3]}.more is not in its manifest",
        ]
    )


def test_a_hidden_file_may_be_another_engines(pair: tuple[Path, Path]) -> None:
    older, newest = pair
    (newest / "engine" / ".metadata").write_bytes(b"of a distributed checkpoint")
    assert assert_passed_over(newest, older).endswith("engine/.metadata is not in its manifest")


@pytest.mark.parametrize(
    "name",
    [
        *(".DS_Store", "engine/.DS_Store", "engine/._shard-0.pt", "Thumbs.db", "desktop.ini"),
        *("Desktop.ini", "engine/@eaDir/shard-0.pt@SynoEAStream", ".directory", ".dropbox"),
        *("engine/.nfs000000000001", "engine/.fuse_hidden0000001"),
    ],
)
def test_what_desktops_and_file_systems_drop_is_no_damage(
    name: str, pair: tuple[Path, Path]
) -> None:
    older, newest = pair
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).write_bytes(b"of no engine")
    assert layout.verify(newest) == []
    assert layout.what_is_wrong(newest) is None
    assert newest_whole(older.parent) == (newest, [])


def test_an_unknown_file_is_to_be_removed_and_not_brought_back(pair: tuple[Path, Path]) -> None:
    _, newest = pair
    for name in ("notes.txt", "engine/shard-0.pt.bak"):
        (newest / name).write_bytes(b"")
    said = layout.what_is_wrong(newest)
    assert said == "engine/shard-0.pt.bak, notes.txt are not in its manifest"
    for problems in ([said], layout.verify(newest)):
        assert layout.remedy(problems) == (
            "remove engine/shard-0.pt.bak, notes.txt, which no save has put there"
        )
    with pytest.raises(
        UserError, match=r"not in its manifest \(and 1 more\); remove engine/shard-0"
    ):
        choose(newest, None, print)

    (newest / FILES[0]).unlink()
    assert layout.remedy(layout.verify(newest)) == "restore it from a copy"
    with pytest.raises(UserError, match="restore it from a copy, or use another checkpoint"):
        choose(newest, None, print)


def test_a_run_whose_only_damage_is_a_stray_file_says_which(pair: tuple[Path, Path]) -> None:
    older, newest = pair
    (newest / "rng-0.pt").unlink()
    (older / "notes.txt").write_bytes(b"")
    _, passed_over = newest_whole(older.parent)
    assert discovery.remedy(passed_over) == (
        "remove notes.txt from checkpoint-4, which no save has put there"
    )
    assert discovery.remedy(passed_over[:1]) == "restore one of them from a copy"


def test_sizes_alone_do_not_show_a_swapped_file(pair: tuple[Path, Path]) -> None:
    older, newest = pair
    FILE_DAMAGES["swap"](newest / FILES[0], older / FILES[0])
    assert layout.what_is_wrong(newest) is None
    assert_passed_over(newest, older)


def test_ranks_that_share_the_reading_read_every_byte_once(pair: tuple[Path, Path]) -> None:
    read: list[int] = []
    older, newest = pair
    FILE_DAMAGES["swap"](newest / FILES[2], older / FILES[2])
    shares = [layout.verify(newest, share=(i, 3), advance=read.append) for i in range(3)]
    assert sorted(map(len, shares)) == [0, 0, 1]
    assert sum(read) == sum(path.stat().st_size for path in layout.files_of(newest))


def test_nothing_is_chosen_where_nothing_is_whole(pair: tuple[Path, Path]) -> None:
    for path in pair:
        (path / FILES[0]).unlink()
    chosen, passed_over = newest_whole(pair[0].parent)
    assert chosen is None
    assert [str(p) for p in passed_over] == [
        f"checkpoint-{step} is not whole: {FILES[0]} is missing" for step in (5, 4)
    ]


def test_a_run_that_never_saved_has_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "checkpoints") == (None, [])
