"""A snapshot is what a file would have held at that moment, and stays so."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import torch

from shardwright.train.strategy.state.snapshot import Snapshot


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

    snapshot = Snapshot()
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
    part = Snapshot().part(rows[2:4])
    rows.zero_()
    assert part.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert part.untyped_storage().nbytes() == 8 * 4
