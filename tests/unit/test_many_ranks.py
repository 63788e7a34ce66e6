"""What it costs to open and to read a checkpoint of many ranks, in calls, files and bytes.

The checkpoints are described as torch describes those of FSDP. `make test-scale` has one of a Llama
of 70 billion parameters and 512 ranks, the default suite a small one of 64.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from shardwright.train.checkpoint.format.lazy import Unreadable, locate
from shardwright.train.checkpoint.read import dcp, portable
from tests import many_ranks
from tests.counting import counted
from tests.many_ranks import LLAMA_70B, Shapes, llama

RANK = 7
"""The one whose part can be read."""
SEEN = "model.layers.0.self_attn.q_proj.weight"
"""The weight that can be read whole."""


@dataclass(frozen=True)
class Large:
    path: Path
    """A checkpoint of Shardwright: the engine's folder, and the trainer's state beside it."""
    shapes: Shapes
    ranks: int

    @property
    def engine(self) -> Path:
        return self.path / "engine"

    @property
    def chunks(self) -> int:
        """How many hold anything."""
        cut = sum(
            many_ranks.rows_of(shape, rank, self.ranks)[1] > 0
            for shape in self.shapes.values()
            for rank in range(self.ranks)
        )
        return 3 * cut + len(self.shapes)


OF_MINUTES = [pytest.mark.scale, pytest.mark.timeout(1800)]
SIZES: dict[str, tuple[Shapes, int]] = {
    "64 ranks": (llama(hidden=136, layers=4, inner=368, key_values=64, vocabulary=1000), 64),
    "512 ranks, 70B": (LLAMA_70B, 512),
}


@pytest.fixture(
    scope="module",
    params=["64 ranks", pytest.param("512 ranks, 70B", marks=OF_MINUTES)],
)
def large(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Large]:
    shapes, ranks = SIZES[request.param]
    found = Large(tmp_path_factory.mktemp("many-ranks") / "checkpoint-3", shapes, ranks)
    many_ranks.write(found.engine, shapes, ranks, lambda key, r: r == RANK or key.endswith(SEEN))
    (found.path / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    yield found
    for file in found.engine.iterdir():  # pytest keeps what is left for three sessions
        file.unlink()


@pytest.fixture
def small(tmp_path: Path) -> Large:
    """Return a checkpoint of four ranks, of which every chunk can be read."""
    shapes: Shapes = {"a": (10, 3), "b": (2, 5)}
    many_ranks.write(tmp_path / "checkpoint/engine", shapes, 4, lambda key, rank: True)
    return Large(tmp_path / "checkpoint", shapes, 4)


def test_it_takes_no_space(large: Large) -> None:
    apparent = sum(file.stat().st_size for file in large.engine.iterdir())
    held = 3 * 4 * sum(torch.Size(shape).numel() for shape in large.shapes.values())
    assert apparent > held
    assert many_ranks.disk_bytes(large.engine) < max(2**24, held / 1000)


def test_opening_is_a_hundredth_of_looking_at_each_chunk(large: Large, small: Large) -> None:
    portable.read(small.path)  # what is imported on first use
    with counted() as opened:
        state = portable.read(large.path)
    whole = state.weights[SEEN]
    assert state.scalars[SEEN]["step"] == 0  # which imports more
    with counted() as first_look:
        locate([whole])
    assert first_look.by_name["describe"] == len(whole.fragments) > large.ranks // 2
    each = first_look.calls / len(whole.fragments)
    print(f"{opened.calls:,} calls; {each:.0f} for each of {large.chunks:,} chunks")
    assert opened.calls < each * large.chunks / 100

    assert opened.by_name["describe"] == 0
    names = [Path(path).name for path in opened.opened]
    assert sorted(names) == [".metadata", "trainer_state.json"]
    assert opened.looks() < 40, "that of all files is one look at their directory"
    assert (state.step, len(state.weights)) == (3, len(large.shapes))


def test_a_rank_looks_at_what_it_holds_and_reads_no_more(large: Large) -> None:
    state = portable.read(large.path)
    with counted() as seen:
        read_bytes = 0
        for name, shape in large.shapes.items():
            start, length = many_ranks.rows_of(shape, RANK, large.ranks)
            for tensor in (state.weights[name], *state.moments[name].values()):
                part = tensor.read(start, start + length)
                assert part.numel() == length
                read_bytes += part.nbytes
    held = [many_ranks.rows_of(shape, RANK, large.ranks)[1] for shape in large.shapes.values()]
    assert read_bytes == 3 * 4 * sum(held)
    assert seen.by_name["describe"] == 3 * sum(length > 0 for length in held)
    files = [Path(path).name for path in seen.opened if path.endswith(".distcp")]
    assert set(files) == {f"__{RANK}_0.distcp"}
    assert len(files) == 2 * seen.by_name["describe"], "to find it, and to read it"


def test_a_number_is_read_where_it_is_asked_for_and_once(large: Large) -> None:
    state = portable.read(large.path)
    assert {name: list(numbers) for name, numbers in state.scalars.items()} == {
        name: ["step"] for name in large.shapes
    }
    with counted() as seen:
        assert all("step" in numbers for numbers in state.scalars.values())
    assert seen.by_name["describe"] == 0
    with counted() as seen:
        for _ in range(3):
            assert state.scalars[SEEN]["step"] == 0
    assert seen.by_name["describe"] == 1


# --- memory -------------------------------------------------------------------------------------

_PEAK = """
import json, sys
from pathlib import Path
from shardwright.train.checkpoint.read import dcp
from shardwright.train.process.memory import peak_resident_bytes, resident_bytes
before = resident_bytes()
found = dcp._metadata(Path(sys.argv[1]) / ".metadata") if sys.argv[2] == "metadata" else dcp.read(
    Path(sys.argv[1])
)
print(json.dumps({"peak": peak_resident_bytes() - before, "kept": resident_bytes() - before}))
"""


def resident(engine: Path, what: str) -> dict[str, int]:
    """Return what a process of its own has taken at most, and has at the end."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(engine), what], check=True, capture_output=True, text=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_memory_is_that_of_what_describes_it(large: Large) -> None:
    if large.ranks > 100:
        metadata, opened = resident(large.engine, "metadata"), resident(large.engine, "all")
        print(f"metadata: {metadata}, opened: {opened}")
        assert opened["peak"] < 1.1 * metadata["peak"]
        assert opened["kept"] < metadata["kept"] / 2
        return
    dcp.read(large.engine)
    tracemalloc.start()
    try:
        described = dcp._metadata(large.engine / ".metadata")
        described_bytes, most_bytes = tracemalloc.get_traced_memory()
        del described
        tracemalloc.reset_peak()
        state = dcp.read(large.engine)
        kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"metadata: {described_bytes:,}, at most {most_bytes:,}")
    print(f"opened: {kept_bytes:,}, at most {peak_bytes:,}, {len(state.weights)} weights")
    assert peak_bytes < 1.1 * most_bytes
    assert kept_bytes < described_bytes / 4


# --- what is found when it is read ----------------------------------------------------------------


def test_a_damaged_chunk_is_refused_when_it_is_read(small: Large) -> None:
    path = small.engine / "__2_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    weights = portable.read(small.path).weights
    assert not weights["a"].read(0, 18).any(), "those of other ranks are whole"
    for _ in range(2):
        with pytest.raises(Unreadable, match=r"__2_0\.distcp at 0 is refused: "):
            weights["a"].read(17, 19)
    with pytest.raises(Unreadable, match=r"__2_0\.distcp at "):
        locate(weights.values())


def test_a_file_is_looked_for_once_and_only_in_the_directory(small: Large, tmp_path: Path) -> None:
    (small.engine / "__2_0.distcp").rename(small.engine / "elsewhere")
    (small.engine / "__2_0.distcp").symlink_to("elsewhere")
    with counted() as inside:
        assert not portable.read(small.path).weights["a"].whole().any()
    assert inside.by_name["_inside"] == small.ranks
    (small.engine / "elsewhere").rename(tmp_path / "elsewhere")
    (small.engine / "__2_0.distcp").unlink()
    (small.engine / "__2_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unreadable, match=r"names the file __2_0\.distcp, which is not in it"):
        portable.read(small.path)


@pytest.mark.parametrize("change", ["negative", "too large", "not a number"])
def test_numbers_that_no_tensor_has_are_refused(change: str, small: Large) -> None:
    path = small.engine / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    described = metadata.state_dict_metadata["model.a"]
    chunk = described.chunks[1]
    if change == "negative":
        described.size = (-10, -3)
        for other in described.chunks:
            other.sizes = tuple(-size for size in other.sizes)
    elif change == "too large":
        metadata.storage_data[
            next(i for i in metadata.storage_data if i.fqn == "model.a")
        ].offset = 2**70
    else:
        chunk.sizes = ("3", 3)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(Unreadable, match=r"\.metadata "):
        portable.read(small.path)
