"""Checkpoints whose files are spread over nodes' disks; a directory stands for each disk."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.checkpoint import discovery, retention
from shardwright.train.checkpoint.discovery import Gather, PassedOver, newest_whole
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.listing import Listing
from shardwright.train.config import CheckpointConfig
from tests.checkpoints import FILES, write_checkpoint


def save(disks: list[Path], step: int, save_id: str = "") -> None:
    for part, disk in enumerate(disks):
        write_checkpoint(disk, step, save_id=save_id or f"save-{step}", part=part, parts=len(disks))


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    disks = [tmp_path / "node-0", tmp_path / "node-1"]
    for step in (1, 2, 3):
        save(disks, step)
    return disks


Chosen = tuple[Path | None, list[PassedOver]]


def together(disks: list[Path], *, shared: bool = False) -> list[Chosen]:
    """Look for the newest with one rank a node at once."""
    meeting = threading.Barrier(len(disks), timeout=60)
    board: dict[int, Any] = {}

    def gather_on(node: int) -> Gather:
        def gather(value: Any) -> list[Any]:
            board[node] = value
            meeting.wait()
            values = [board[i] for i in range(len(disks))]
            meeting.wait()
            return values

        return gather

    found: dict[int, Chosen] = {}

    def look(node: int) -> None:
        share = (node, len(disks)) if shared else (0, 1)
        found[node] = newest_whole(disks[node], gather=gather_on(node), share=share)

    threads = [threading.Thread(target=look, args=(node,)) for node in range(len(disks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[node] for node in range(len(disks))]


def agreed(disks: list[Path]) -> tuple[int | None, list[str]]:
    """Return the step and the messages that all nodes agree on."""
    found = together(disks)
    steps = {layout.step_of(path) if path is not None else None for path, _ in found}
    messages = {tuple(map(str, passed_over)) for _, passed_over in found}
    assert len(steps) == len(messages) == 1, "the nodes disagree"
    return steps.pop(), list(messages.pop())


def test_each_node_takes_its_own_part_of_the_same_checkpoint(disks: list[Path]) -> None:
    assert together(disks) == [(disk / "checkpoint-3", []) for disk in disks]


def test_a_part_that_is_damaged_on_one_node_is_passed_over_by_all(disks: list[Path]) -> None:
    shutil.copy(disks[0] / "checkpoint-2" / FILES[0], disks[1] / "checkpoint-3" / FILES[0])
    step, (message,) = agreed(disks)
    assert step == 2
    assert message.startswith("checkpoint-3 is not whole: engine/shard-0.pt has the hash")


def test_a_part_that_was_never_published_is_missed_by_all(disks: list[Path]) -> None:
    shutil.rmtree(disks[1] / "checkpoint-3")
    assert agreed(disks) == (2, ["checkpoint-3 is not whole: 1 of 2 nodes' disks do not hold it"])


def test_a_part_without_manifest_is_named(disks: list[Path]) -> None:
    (disks[0] / "checkpoint-3" / layout.MANIFEST).unlink()
    assert agreed(disks) == (2, ["checkpoint-3 is not whole: it has no manifest"])


def test_parts_of_two_saves_of_one_step_do_not_fit(disks: list[Path]) -> None:
    write_checkpoint(disks[1], 3, save_id="a second attempt", part=1, parts=2)
    assert agreed(disks) == (
        2,
        ["checkpoint-3 is not whole: its parts on the nodes' disks come from different saves"],
    )


def test_a_node_that_is_not_there_is_missed(disks: list[Path]) -> None:
    assert agreed(disks[:1]) == (
        None,
        [
            f"checkpoint-{step} is not whole: 1 of its 2 parts are on disks of nodes that are not "
            "taking part"
            for step in (3, 2, 1)
        ],
    )


def test_a_new_node_finds_nothing_and_so_does_the_run(disks: list[Path], tmp_path: Path) -> None:
    step, messages = agreed([disks[0], tmp_path / "node-2"])
    assert step is None
    assert messages[0] == "checkpoint-3 is not whole: 1 of 2 nodes' disks do not hold it"


@pytest.mark.parametrize("file", FILES)
def test_ranks_that_share_a_disk_share_the_reading(tmp_path: Path, file: str) -> None:
    older, newest = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    assert together([tmp_path] * 3, shared=True) == [(newest, [])] * 3
    shutil.copy(older / file, newest / file)
    found = together([tmp_path] * 3, shared=True)
    assert [path for path, _ in found] == [older] * 3
    assert all(f"{file} has the hash" in str(passed_over[0]) for _, passed_over in found)


def test_every_node_deletes_the_same_on_its_own_disk(disks: list[Path]) -> None:
    rule = CheckpointConfig(keep_last=1)
    assert [retention.retain(disk, rule, newest=3) for disk in disks] == [[1, 2], [1, 2]]
    assert agreed(disks) == (3, [])


def test_what_only_one_node_holds_keeps_nothing_on_either(disks: list[Path]) -> None:
    shutil.rmtree(disks[1] / "checkpoint-2")
    whole, _ = discovery.together([discovery.parts_in(Listing(disk)) for disk in disks])
    assert whole == [1, 3]
    rule = CheckpointConfig(keep_last=2)
    for disk in disks:
        assert retention.retain(disk, rule, newest=3, among=whole) == []
    save(disks, 4)
    for disk in disks:
        assert retention.retain(disk, rule, newest=4, among=[1, 3, 4]) == [1]


def test_a_node_that_was_killed_before_it_deleted_catches_up(disks: list[Path]) -> None:
    rule = CheckpointConfig(keep_last=1)
    retention.retain(disks[0], rule, newest=3)
    assert agreed(disks) == (3, [])
    save(disks, 4)
    for disk in disks:
        retention.retain(disk, rule, newest=4)
    assert [layout.named(disk) for disk in disks] == [[(4, d / "checkpoint-4")] for d in disks]
