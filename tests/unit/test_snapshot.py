"""A snapshot is what a file would have held at that moment, and stays so."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import pytest
import torch

from shardwright.train.strategy.state.host_memory import HostMemory, aligned
from shardwright.train.strategy.state.snapshot import Snapshot, needed_bytes


def file_of(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Scaler:
    def __init__(self) -> None:
        self.scale = 8.0


def test_its_file_has_the_bytes_of_the_original_before_it_changed() -> None:
    flat = torch.arange(64, dtype=torch.float32)
    module = OrderedDict(embedding=flat[:32].view(4, 8), head=flat[:32].view(4, 8))
    module._metadata = {"version": 1}  # type: ignore[attr-defined]
    state = {
        "module": module,
        "shards": [flat[32:48], flat[48:].view(4, 4).t()],
        "master": flat.clone().requires_grad_(),
        "empty": torch.empty(0, dtype=torch.bfloat16),
        "shapes": (torch.Size([4, 8]), None, "text"),
        "scaler": Scaler(),
    }
    before = file_of(state)

    snapshot = Snapshot(HostMemory(), needed_bytes(state))
    copied = snapshot.of(state)
    snapshot.wait()
    flat.zero_()
    with torch.no_grad():
        state["master"].fill_(7)  # type: ignore[attr-defined]
    state["scaler"].scale = 4.0  # type: ignore[attr-defined]
    module["new"] = torch.ones(1)

    assert file_of(copied) == before
    assert copied["module"]["embedding"].data_ptr() == copied["module"]["head"].data_ptr()


def test_a_part_is_copied_without_the_rest_of_its_storage() -> None:
    rows = torch.arange(40.0).view(10, 4)
    part = Snapshot(HostMemory(), aligned([rows[2:4].nbytes])).part(rows[2:4])
    rows.zero_()
    assert part.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert part.untyped_storage().nbytes() == 8 * 4


def test_the_same_memory_serves_every_snapshot_until_it_is_too_small() -> None:
    memory = HostMemory()

    def taken(*lengths: int) -> list[int]:
        state = [torch.full((length,), 3, dtype=torch.uint8) for length in lengths]
        snapshot = Snapshot(memory, needed_bytes(state))
        copies = [snapshot.tensor(tensor) for tensor in state]
        snapshot.wait()
        assert all(torch.equal(a, b) for a, b in zip(copies, state, strict=True))
        assert [copy.untyped_storage().nbytes() for copy in copies] == list(lengths)
        return [copy.data_ptr() for copy in copies if copy.numel()]

    first = taken(100, 0, 1, 4000)
    assert [address - first[0] for address in first] == [0, 128, 192]
    assert first[0] % 4096 == 0
    assert taken(100, 0, 1, 4000) == first
    assert taken(64, 64) == [first[0], first[0] + 64], "less needs no other"
    larger = taken(100_000)
    assert taken(64) == larger


def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []

    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, size: int, flags: int) -> int:
            asked.append((address, size, flags))
            return 2 if refuses else 0

        @staticmethod
        def cudaHostUnregister(address: int) -> int:
            asked.append(address)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    refuses = False
    memory = HostMemory()
    memory.begin(5000, pinned=True)
    address = memory.take(5000).data_ptr()
    memory.begin(5000, pinned=True)
    memory.release()
    assert asked == [(address, 8192, 0), address]
    assert not caplog.records

    refuses = True
    memory.begin(5000, pinned=True)
    torch.empty(0, dtype=torch.uint8).set_(memory.take(5000)).fill_(1)
    memory.release()
    assert len(asked) == 3, "nothing is undone that was not done"
    (record,) = caplog.records
    assert "8.2 kB of host memory for checkpoint.async=true could not be pinned" in record.message
