"""Whole tensors go into safetensors files slice by slice, and safetensors itself reads them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shardwright.train.checkpoint.format.outputs import Output, share
from shardwright.train.export import safetensors as whole
from shardwright.train.export.safetensors import Budget, Writer
from tests.unit.tensors import in_fragments

TENSORS = {
    "mask": torch.tensor([True, False, True]),  # 3 bytes, after which nothing would be aligned
    "matrix": torch.randn(7, 13),
    "half": torch.randn(5, 3).bfloat16(),
    "fp16": torch.randn(4).half(),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 4),
    "steps": torch.tensor(2**40),
    "positions": torch.arange(9, dtype=torch.int32).view(3, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "small": torch.arange(-3, 3, dtype=torch.int8),
    "double": torch.randn(2, dtype=torch.float64),
}


def plan_of(tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> whole.Plan:
    outputs = [Output(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    return whole.plan(outputs, max_shard_bytes)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 120, 1])
def test_safetensors_reads_every_bit(max_shard_bytes: int, tmp_path: Path) -> None:
    plan = plan_of(TENSORS, max_shard_bytes)
    writer = Writer(tmp_path, plan)
    # Slices come in any order.
    for start in (4, 2, 0):
        for name, tensor in reversed(TENSORS.items()):
            writer.write(name, tensor.flatten()[start : start + 2 if start < 4 else None], start)
    writer.flush()

    files = sorted(tmp_path.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == plan.bytes
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118
        assert sum(sizes) <= max_shard_bytes or sum(size > 0 for size in sizes) == 1
        found |= load_file(file)
    assert {name: bits(t) for name, t in found.items()} == {n: bits(t) for n, t in TENSORS.items()}
    for planned in plan.files:
        for name, offset in planned.offsets.items():
            assert offset % TENSORS[name].dtype.itemsize == 0, "aligned for whoever maps it"
    if len(files) == 1:
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    else:
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        index = json.loads((tmp_path / whole.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
        assert {name: tmp_path / file for name, file in index["weight_map"].items()} == {
            name: file for file in files for name in load_file(file)
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_streamed_in_slices_and_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {"a": torch.randn(40, 5), "b": torch.randn(33).bfloat16(), "c": torch.randn(())}
    lazy = {}
    for name, tensor in stored.items():
        (tmp_path / name).mkdir()
        lazy[name] = in_fragments(tensor, tmp_path / name, [1, 17][: tensor.ndim])
    plan = whole.plan(Output(name, tuple(t.shape), dtype) for name, t in stored.items())
    counted: list[int] = []
    whole.stream(lazy, Writer(tmp_path, plan), Budget(threads=3, slice_bytes=32), counted.append)
    found = load_file(tmp_path / "model.safetensors")
    assert {n: bits(t) for n, t in found.items()} == {
        n: bits(t.to(dtype)) for n, t in stored.items()
    }
    assert sum(counted) == plan.tensor_bytes
    assert len(counted) > 30


# --- past the page cache --------------------------------------------------------------------------

BLOCK = whole.BLOCK_BYTES


@pytest.mark.parametrize(
    ("offset", "address", "length", "blocks"),
    [
        (0, 0, 3 * BLOCK, (0, 3 * BLOCK)),
        (2 * BLOCK, 5 * BLOCK, BLOCK + 1, (0, BLOCK)),
        (BLOCK - 8, 7 * BLOCK - 8, 2 * BLOCK, (8, BLOCK + 8)),
        (BLOCK - 8, 7 * BLOCK - 16, 2 * BLOCK, (0, 0)),  # in memory they begin elsewhere
        (BLOCK - 8, 7 * BLOCK - 8, BLOCK + 7, (0, 0)),  # no block is whole
        (8, 8, 100, (0, 0)),
        (0, 0, 0, (0, 0)),
    ],
)
def test_whole_blocks_of_the_file_and_of_memory_are_found(
    offset: int, address: int, length: int, blocks: tuple[int, int]
) -> None:
    assert whole.in_blocks(offset, address, length) == blocks


LARGE = {
    "mask": torch.tensor([True, False, True]),
    "matrix": torch.randn(3 * BLOCK, 5),
    "narrow": torch.randn(7 * BLOCK + 5).bfloat16(),
    "wide": torch.randn(3 * BLOCK + 1, dtype=torch.float64),
    "small": torch.randn(9),
}


def streamed(directory: Path, threads: int, *, past_cache: bool) -> bytes:
    """Return the file that becomes of LARGE, in fp32 but for what is no number."""
    outputs, lazy = [], {}
    for name, tensor in LARGE.items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        cuts = [1, tensor.numel() // 2 + 3] if tensor.numel() > 9 else []
        lazy[name] = in_fragments(tensor, directory / name, cuts)
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        outputs.append(Output(name, tuple(tensor.shape), dtype))
    writer = Writer(directory, whole.plan(outputs), past_cache=past_cache)
    whole.stream(lazy, writer, Budget(threads, slice_bytes=4 * BLOCK))
    writer.flush()
    file = directory / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    return data


@pytest.mark.parametrize("threads", [1, 3])
def test_all_but_the_ends_of_tensors_is_written_past_the_page_cache(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = streamed(tmp_path, 1, past_cache=False)
    past: list[int] = []
    through: list[int] = []
    write_at = whole._write_at

    def counting(data: memoryview, path: Path, offset: int, flags: int = 0) -> None:
        (past if flags & os.O_DIRECT else through).append(len(data))
        write_at(data, path, offset, flags & ~os.O_DIRECT)  # not every disk of a test can

    monkeypatch.setattr(whole, "_write_at", counting)
    assert streamed(tmp_path, threads, past_cache=True) == expected
    assert sum(past) + sum(through) == sum(t.numel() * 4 for t in LARGE.values()) - 3 * 4 + 3
    assert all(length % BLOCK == 0 for length in past)
    assert len(through) <= 2 * len(LARGE), "each tensor's first and last block"
    assert sum(through) < 2 * len(LARGE) * BLOCK


@pytest.mark.parametrize("threads", [1, 3])
def test_what_the_disk_gets_past_the_page_cache_is_what_it_gets_through_it(
    threads: int, tmp_path: Path
) -> None:
    expected = streamed(tmp_path, 1, past_cache=False)
    for _ in range(5):
        assert streamed(tmp_path, threads, past_cache=True) == expected


def test_a_file_system_that_cannot_write_past_the_page_cache_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = streamed(tmp_path, 1, past_cache=False)
    refused, open_file = [], os.open

    def refusing(path: Path, flags: int, *arguments: int) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return open_file(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    assert streamed(tmp_path, 1, past_cache=True) == expected
    assert len(refused) == 1


def test_an_error_past_the_page_cache_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/model.safetensors'"):
        streamed(tmp_path, 1, past_cache=True)


# --- several writers ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_writers_share_all_elements_evenly_and_in_their_order(count: int) -> None:
    lengths = [5, 0, 17, 1, 20]
    found = [list(share(lengths, index, count)) for index in range(count)]
    elements = [(n, i) for part in found for n, first, last in part for i in range(first, last)]
    assert elements == [(n, i) for n, length in enumerate(lengths) for i in range(length)]
    sizes = [sum(last - first for _, first, last in part) for part in found]
    assert max(sizes) - min(sizes) <= 1


def test_processes_write_their_parts_into_the_same_files(tmp_path: Path) -> None:
    lazy = {}
    for name, tensor in TENSORS.items():
        (tmp_path / name).mkdir()
        lazy[name] = in_fragments(tensor, tmp_path / name, [1][: tensor.ndim])
    files = []
    for count in (1, 3):
        directory = tmp_path / f"by {count}"
        directory.mkdir()
        plan = plan_of(TENSORS, 120)
        Writer(directory, plan)
        for index in range(count):
            writer = Writer(directory, plan, makes_files=False)
            whole.stream(lazy, writer, Budget(threads=2, slice_bytes=32), part=(index, count))
            writer.flush()
        writer.check_sizes()
        files.append({path.name: path.read_bytes() for path in directory.iterdir()})
    assert len(files[0]) > 2
    assert files[0] == files[1]


def test_a_process_waits_for_its_own_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(TENSORS, 1)
    Writer(tmp_path, plan)
    writer = Writer(tmp_path, plan, makes_files=False)
    writer.write("small", TENSORS["small"])
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    writer.flush()
    assert len(synced) == 1
    shard = Path(synced[0])
    assert list(load_file(shard)) == ["small"]
    shard.write_bytes(shard.read_bytes()[:-1])
    for look in (writer.flush, writer.check_sizes):
        with pytest.raises(OSError, match="instead of"):
            look()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_named_unless_it_is_allowed(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor = torch.ones(11)
    tensor[7] = value
    plan = whole.plan([Output("poisoned", (11,), dtype)])
    with pytest.raises(FloatingPointError, match=r"^poisoned holds NaN or infinity$"):
        Writer(tmp_path, plan).write("poisoned", tensor)
    (tmp_path / "model.safetensors").unlink()
    Writer(tmp_path, plan, allow_nan=True).write("poisoned", tensor)
    written = load_file(tmp_path / "model.safetensors")["poisoned"]
    torch.testing.assert_close(written, tensor.to(dtype), equal_nan=True)


@pytest.mark.parametrize("allow_nan", [False, True])
def test_what_becomes_infinite_is_an_error_always(allow_nan: bool, tmp_path: Path) -> None:
    plan = whole.plan([Output("large", (3,), torch.float16)])
    writer = Writer(tmp_path, plan, allow_nan=allow_nan)
    with pytest.raises(
        OverflowError, match=r"^large holds 70000, which becomes infinity in float16$"
    ):
        writer.write("large", torch.tensor([1.0, -70000.0, 2.0]))


def test_the_first_error_of_a_thread_ends_the_others() -> None:
    def fail_at_20(number: int) -> None:
        if number == 20:
            raise ValueError("twenty")

    numbers = itertools.count()
    with pytest.raises(ValueError, match="twenty"):
        whole.on_threads(numbers, fail_at_20, 4)
    assert next(numbers) < 10**6


def test_a_full_disk_shows_before_the_first_slice(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    try:
        with pytest.raises(OSError, match=r"No space left on device: '.*/model.safetensors'"):
            Writer(tmp_path, whole.plan([Output("large", (2**20,), torch.float32)]))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("cores", [1, 2, 16, 256])
@pytest.mark.parametrize("max_memory_bytes", [whole.LEAST_MEMORY_BYTES, 2**26, 2**29, 2**40])
def test_a_budget_stays_below_the_memory(max_memory_bytes: int, cores: int) -> None:
    budget = whole.budget(max_memory_bytes, cores)
    assert 1 <= budget.threads <= cores
    assert 2**18 <= budget.slice_bytes <= 2**23
    assert budget.bytes <= max_memory_bytes
