"""All ranks write final/, each its own part: what each writes, holds and tells the others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwright.train.checkpoint.format.outputs import Output
from shardwright.train.export import final as final_module
from shardwright.train.export import parts, safetensors
from shardwright.train.export.card import Card
from shardwright.train.export.final import export
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process import meeting
from tests.distributed.jobs import held, trained
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

MAX_SHARD_BYTES = 20_000
SLICE_ELEMENTS = 500


@dataclass
class Seen:
    """What one rank has done while final/ was written."""

    written: list[tuple[str, int, int]] = field(default_factory=list)
    """File, first byte and the one behind the last."""
    collectives: dict[str, int] = field(default_factory=dict)
    """The largest number of floating elements that an operation was called with, by its name."""
    largest_made_bytes: int = 0
    """Of all tensors that were made, views left out."""
    own_elements: dict[str, int] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if function.namespace in ("c10d", "_c10d_functional"):
            floating = [t.numel() for t in given if t.is_floating_point()]
            name = function.overloadpacket.__name__
            most = max([self.seen.collectives.get(name, 0), *floating])
            self.seen.collectives[name] = most
        result = function(*args, **(kwargs or {}))
        known = {_address(t) for t in given}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and _address(made) not in known:
                size = made.untyped_storage().nbytes() if made.device.type != "meta" else 0
                self.seen.largest_made_bytes = max(self.seen.largest_made_bytes, size)
        return result


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def watched() -> Iterator[Seen]:
    """Count what this rank writes, makes and tells others while the weights are written."""
    seen = Seen()
    pwrite, write_tensors = os.pwrite, final_module._write_tensors

    def counted(descriptor: int, data: memoryview, offset: int) -> int:
        done = pwrite(descriptor, data, offset)
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        seen.written.append((file, offset, offset + done))
        return done

    def watched_write(*arguments: Any) -> Any:
        with _Watch(seen):
            return write_tensors(*arguments)

    with (
        mock.patch.object(os, "pwrite", counted),
        mock.patch.object(final_module, "_write_tensors", watched_write),
        mock.patch.object(parts, "SLICE_ELEMENTS", SLICE_ELEMENTS),
    ):
        yield seen


def export_watched(trainer: Trainer) -> Seen:
    """Write final/; beside it what one rank makes of the whole weights, gathered by the engines."""
    with watched() as seen:
        final = export(trainer, lambda: Card(""), max_shard_bytes=MAX_SHARD_BYTES)
    for name, _, values in trainer.engine.own_weights(trainer):
        seen.own_elements[name] = seen.own_elements.get(name, 0) + values.numel()
    whole = {name: torch.from_numpy(of["weight"]) for name, of in held(trainer).items()}
    if trainer.is_world_process_zero():
        outputs = [Output(n, tuple(tensor.shape), torch.float32) for n, tensor in whole.items()]
        directory = final.with_name("gathered")
        directory.mkdir()
        writer = safetensors.Writer(directory, safetensors.plan(outputs, MAX_SHARD_BYTES))
        for name, tensor in whole.items():
            writer.write(name, tensor)
    return seen


def slow(strategy: str, world_size: int) -> Any:
    """Return a case that the default suite leaves out."""
    return pytest.param(strategy, world_size, marks=pytest.mark.slow)


CASES = [
    *(("ddp", 2), slow("zero0", 2), ("zero1", 2), slow("zero2_round_robin", 2), slow("zero3", 2)),
    *(slow("fsdp", 2), ("zero3_nothing_kept", 4), ("fsdp", 4), ("fsdp_hybrid", 4)),
]


@pytest.mark.parametrize(("strategy", "world_size"), CASES)
def test_each_rank_writes_its_own_part_and_nobody_gathers(
    strategy: str,
    world_size: int,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["model"]["vocab_size"] = 385  # rows that ranks do not divide
    tree["strategy"], tree["precision"] = STRATEGIES[strategy], {"compute_dtype": "bf16"}
    tree["launcher"]["nproc_per_node"] = world_size
    tree["trainer"]["max_steps"] = 1
    run_dir = frozen_run(tree)
    seen: list[Seen] = ranks(world_size)(trained, run_dir, export_watched)

    # The files are those that one rank writes which has all of it.
    gathered, final = run_dir / "gathered", run_dir / "final"
    names = {path.name for path in gathered.iterdir()}
    assert len(names) > 3
    assert names <= {path.name for path in final.iterdir()}
    for name in names:
        assert (final / name).read_bytes() == (gathered / name).read_bytes(), name

    # Each byte of the tensors is written once, by whichever rank.
    headers = {f: 8 + int.from_bytes((final / f).read_bytes()[:8], "little") for f in names}
    for file, begin in headers.items():
        if file.endswith(".safetensors"):
            written = sorted(w[1:] for rank in seen for w in rank.written if w[0] == file)
            ends = [begin, *(stop for _, stop in written)]
            assert [start for start, _ in written] == ends[:-1]
            assert ends[-1] == (final / file).stat().st_size
    model_bytes = sum(stop - start for rank in seen for _, start, stop in rank.written)
    for rank in seen:
        share = sum(stop - start for _, start, stop in rank.written)
        assert share < 1.3 * model_bytes / world_size
        # No whole parameter, and nothing as large, is made; nothing but flags is told.
        assert rank.largest_made_bytes <= SLICE_ELEMENTS * 4
        assert set(rank.collectives) <= {"allreduce_", "broadcast_"}
        assert max(rank.collectives.values()) <= 1
        assert max(rank.own_elements.values()) > SLICE_ELEMENTS


@pytest.fixture
def run_dir_of_a_step(tiny_tree: TreeOf, frozen_run: Freeze) -> Path:
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES["ddp"]
    tree["trainer"]["max_steps"] = 1
    return frozen_run(tree)


# Ranks leave a meeting half a second apart, on a busy machine more.
TIMEOUT_SECONDS, SLOW_SECONDS = 3.0, 4.5


def export_to_slow_disks(trainer: Trainer) -> None:
    """Export where rank 1's part, and then what rank 0 adds, take longer than a collective may."""
    # Collectives of before the limit are done; gloo's get it as they begin.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_SECONDS))
    flush = safetensors.Writer.flush

    def slow_flush(writer: safetensors.Writer) -> None:
        flush(writer)
        if trainer.args.process_index == 1:
            time.sleep(SLOW_SECONDS)

    def slow_card() -> Card:
        time.sleep(SLOW_SECONDS)
        return Card("")

    with mock.patch.object(safetensors.Writer, "flush", slow_flush):
        export(trainer, slow_card)


def test_a_disk_slower_than_a_collective_may_be_fails_nothing(
    run_dir_of_a_step: Path, ranks: RanksOf
) -> None:
    run_dir = run_dir_of_a_step
    ranks(2)(trained, run_dir, export_to_slow_disks)
    assert (run_dir / "final" / "model.safetensors").exists()


def export_refused(trainer: Trainer) -> str:
    """Export where rank 1's disk is full; return what this rank raises."""

    def full(writer: safetensors.Writer) -> None:
        if trainer.args.process_index == 1:
            raise OSError(28, "No space left on device", "the file")

    with (
        mock.patch.object(safetensors.Writer, "flush", full),
        pytest.raises(OSError, match="No space left") as caught,
    ):
        export(trainer, lambda: Card(""))
    return repr(caught.value)


def test_a_rank_that_cannot_write_fails_all_alike_and_leaves_nothing(
    run_dir_of_a_step: Path, ranks: RanksOf
) -> None:
    run_dir = run_dir_of_a_step
    said = ranks(2)(trained, run_dir, export_refused)
    assert said == ["OSError(28, 'No space left on device')"] * 2
    assert not [path for path in run_dir.iterdir() if "final" in path.name]


def export_from_two_nodes(trainer: Trainer) -> list[tuple[str, int, int]]:
    """Export as if each rank were a node whose disk the other does not see."""
    with watched() as seen, mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="1"):
        export(trainer, lambda: Card(""), max_shard_bytes=MAX_SHARD_BYTES)
    return seen.written


def test_nodes_with_disks_of_their_own_send_their_part_to_the_first(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    weights = []
    for node_local in (False, True):
        tree = tiny_tree("clm")
        tree["strategy"] = {**STRATEGIES["zero2"], "node_local_checkpoints": node_local}
        tree["trainer"]["max_steps"] = 1
        run_dir = frozen_run(tree)
        first, second = ranks(2)(trained, run_dir, export_from_two_nodes)
        assert first
        assert bool(second) is not node_local
        files = sorted((run_dir / "final").glob("*.safetensors*"))
        weights.append({path.name: path.read_bytes() for path in files})
    assert weights[0] == weights[1]


# --- ranks as threads, where what ends a wait is looked at alone ---------------------------------


def at_once(size: int, act: Any) -> list[BaseException | None]:
    """Have ranks act at one meeting, each in a thread; return what each raised."""
    store: Any = dist.HashStore()
    raised: list[BaseException | None] = [None] * size

    def one(rank: int) -> None:
        met = meeting.Meeting(store, rank, size)
        with met.listening():
            try:
                act(met, rank)
                met.wait_for_all()
            except Exception as error:
                met.fail(error)
                raised[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def test_a_meeting_ends_when_all_have_come() -> None:
    order: list[int] = []

    def come(met: meeting.Meeting, rank: int) -> None:
        if rank:
            met.wait_for(f"after {rank - 1}")
        order.append(rank)
        met.set(f"after {rank}")

    assert at_once(4, come) == [None] * 4
    assert order == [0, 1, 2, 3]


def test_what_one_rank_raises_all_raise() -> None:
    class Unpicklable(RuntimeError):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    for error, text in (
        (FloatingPointError("weight holds NaN"), "weight holds NaN"),
        (Unpicklable(1, 2), "1 and 2"),
    ):

        def come(met: meeting.Meeting, rank: int, error: Exception = error) -> None:
            if rank == 2:
                raise error

        raised = at_once(4, come)
        assert [str(found) for found in raised] == [text] * 4
        if isinstance(error, FloatingPointError):
            assert {type(found) for found in raised} == {FloatingPointError}


def test_a_rank_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SILENT_SECONDS", 2.0)  # of one that lives, forty signs
    monkeypatch.setattr(meeting, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(meeting, "SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setattr(meeting, "_TELLING_SECONDS", 0.1)
    store: Any = dist.HashStore()
    raised = []

    def one(rank: int) -> None:
        met = meeting.Meeting(store, rank, 3)
        with met.listening(), pytest.raises(meeting.PeerLost) as caught:
            met.wait_for_all()
        raised.append(str(caught.value))

    # The third never comes, or was killed before.
    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(raised) == 2
    assert all(text.startswith("rank 2 has given no sign of life for ") for text in raised)
