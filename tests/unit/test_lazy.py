"""Tensors are read from files in slices, at the cost of the slice."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.train.checkpoint.format.lazy import (
    Fragment,
    LazyTensor,
    Span,
    Unlocated,
    Unreadable,
    _are_apart,
    describe,
    lazy,
)
from tests.counting import counted
from tests.unit.tensors import in_fragments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_is_that_of_the_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(7 * 13).view(7, 13).to(dtype)
    stored = in_fragments(tensor, tmp_path, [1, 40, 41])
    assert torch.equal(stored.whole(), tensor)
    draw = random.Random(0)
    for _ in range(50):
        start = draw.randrange(tensor.numel() + 1)
        stop = draw.randrange(start, tensor.numel() + 1)
        assert torch.equal(stored.read(start, stop), tensor.flatten()[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6), (6, 7)])
def test_what_is_outside_of_a_tensor_is_refused(start: int, stop: int, tmp_path: Path) -> None:
    stored = in_fragments(torch.zeros(5), tmp_path, [2])
    with pytest.raises(Unreadable, match=f"elements {start} to {stop} of a tensor of 5"):
        stored.read(start, stop)


def test_fragments_that_do_not_cover_a_tensor_are_refused(tmp_path: Path) -> None:
    first, second = in_fragments(torch.zeros(5), tmp_path, [2]).fragments
    for fragments, reason in (
        ((first,), "2 of a tensor's 5 elements"),
        ((second,), "elements 0 to 2 of a tensor of 5 are in no file"),
        ((first, first), "elements 2 to 0"),
    ):
        with pytest.raises(Unreadable, match=reason):
            LazyTensor((5,), torch.float32, fragments)


def in_boxes(
    tensor: torch.Tensor, directory: Path, boxes: list[tuple[int, int, int, int]]
) -> LazyTensor:
    """Lay rectangles (top, left, bottom, right) of a matrix into a file for each."""
    fragments, stride = [], tensor.shape[1]
    for top, left, bottom, right in boxes:
        path, part = directory / f"box-{top}-{left}", tensor[top:bottom, left:right].contiguous()
        path.write_bytes(part.view(torch.uint8).numpy().tobytes())
        where = Fragment(path, 0, top * stride + left, part.numel(), right - left, stride)
        fragments.append(where)
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tuple(fragments))


def test_a_matrix_cut_along_columns_reads_as_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardwright.train.checkpoint.format.lazy._SCATTERED_BYTES", 50)
    tensor = torch.arange(9 * 11).view(9, 11).to(torch.float32)
    boxes = [(0, 0, 9, 4), (0, 4, 5, 11), (5, 4, 9, 5), (5, 5, 9, 11)]
    stored = in_boxes(tensor, tmp_path, boxes)
    assert torch.equal(stored.whole(), tensor)
    for start in range(tensor.numel() + 1):
        for stop in range(start, tensor.numel() + 1):
            assert torch.equal(stored.read(start, stop), tensor.flatten()[start:stop])


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([(0, 0, 3, 2)], "6 of a tensor's 12 elements are in the files"),
        ([(0, 0, 3, 2), (0, 1, 3, 3)], "some of a tensor's 12 elements are in no file, others"),
        ([(0, 0, 3, 2), (1, 2, 4, 4)], "some of a tensor's 12 elements are in no file, others"),
        ([(0, 0, 3, 2), (0, 2, 3, 5)], "a tensor of 12 elements is cut in an unknown way"),
    ],
)
def test_rectangles_that_do_not_cover_a_matrix_are_refused(
    boxes: list[tuple[int, int, int, int]], reason: str
) -> None:
    fragments = tuple(
        Fragment(Path("box"), 0, top * 4 + left, (bottom - top) * (right - left), right - left, 4)
        for top, left, bottom, right in boxes
    )
    with pytest.raises(Unreadable, match=reason):
        LazyTensor((3, 4), torch.float32, fragments)


Box = tuple[int, int, int, int]


def overlaps(one: Box, other: Box) -> bool:
    above = one[2] <= other[0] or other[2] <= one[0]
    return not (above or one[3] <= other[1] or other[3] <= one[1])


@given(
    st.lists(
        st.tuples(*(st.integers(0, 9) for _ in range(4)))
        .map(lambda n: (*sorted(n[::2]), *sorted(n[1::2])))
        .map(lambda n: (n[0], n[2], n[1], n[3]))
        .filter(lambda box: box[0] < box[2] and box[1] < box[3]),
        max_size=6,
    )
)
def test_rectangles_are_apart_where_no_two_overlap(boxes: list[Box]) -> None:
    found = any(overlaps(a, b) for a, b in itertools.combinations(boxes, 2))
    assert _are_apart(boxes) == (not found)


def test_a_tensor_in_many_rectangles_is_checked_in_one_pass() -> None:
    def calls(ranks: int) -> int:
        fragments = tuple(
            Fragment(Path("box"), 0, top * 4 * ranks + left, 4, 2, 2 * ranks)
            for top in range(0, 2, 2)
            for left in range(0, 2 * ranks, 2)
        )
        with counted() as seen:
            LazyTensor((2, 2 * ranks), torch.float32, fragments)
        return seen.calls

    assert calls(2048) < 3 * calls(1024), "with each of all others it would be four times as much"


class Noting(Unlocated):
    """Fragments that note which of them were asked for."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self.asked: list[int] = []
        self._fragments = fragments

    def __len__(self) -> int:
        return len(self._fragments)

    def spans(self) -> Iterator[tuple[int, int, int, int]]:
        return (self.span(i) for i in range(len(self)))

    def span(self, index: int) -> Span:
        f = self._fragments[index]
        return Span(f.start, f.length, f.run, f.stride)

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return self._fragments[index]


def test_of_fragments_that_must_be_looked_for_only_those_of_a_slice_are(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "boxes").mkdir()
    rows = in_fragments(torch.arange(40.0), tmp_path / "rows", [10, 20, 30])
    matrix = torch.arange(36.0).view(4, 9)
    boxes = in_boxes(
        matrix, tmp_path / "boxes", [(0, 0, 4, 4), (0, 4, 2, 9), (2, 4, 4, 5), (2, 5, 4, 9)]
    )
    for stored, slices in (
        (rows, {(0, 0): [], (10, 20): [1], (9, 11): [0, 1], (35, 40): [3], (0, 40): [0, 1, 2, 3]}),
        (boxes, {(0, 3): [0], (5, 8): [1], (22, 23): [2], (18, 36): [0, 2, 3]}),
    ):
        whole = stored.whole().flatten()
        for (start, stop), expected in slices.items():
            noting = Noting(stored.fragments)
            tensor = LazyTensor(stored.shape, stored.dtype, noting)
            assert torch.equal(tensor.read(start, stop), whole[start:stop])
            assert noting.asked == expected
    noting = Noting(rows.fragments)
    cut = LazyTensor((40,), torch.float32, noting).cut(12, 10, 100)
    assert [(f.start, f.length) for f in cut] == [(100, 8), (108, 2)]
    assert noting.asked == [1, 2]


def test_a_file_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    tensor = LazyTensor((5,), torch.float32, (Fragment(tmp_path / "short", 0, 0, 5),))
    with pytest.raises(Unreadable, match="short ends 10 bytes too early"):
        tensor.whole()


def test_a_slice_of_a_big_tensor_takes_the_memory_of_the_slice(tmp_path: Path) -> None:
    elements, slice_elements = 2**26, 2**20  # 256 MiB and 4 MiB
    path = tmp_path / "big.pt"
    torch.save({"weight": torch.ones(elements)}, path)
    describe(path)  # imports much on its first use
    before = peak_bytes(reset=True)
    stored = lazy(describe(path)["weight"], path)
    part = stored.read(elements // 2, elements // 2 + slice_elements)
    assert peak_bytes() - before < 4 * 4 * slice_elements
    assert part.sum() == slice_elements


def peak_bytes(*, reset: bool = False) -> int:
    """Return the most memory that this process has had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024
