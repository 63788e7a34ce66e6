"""Saves while training: hashed on the way, safe from disk trouble, in the background or not."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from transformers import TrainerCallback

from shardwright.train.checkpoint.format import layout
from shardwright.train.config import CheckpointConfig, load
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process.agreement import from_all
from shardwright.train.process.leave import gloo_worker_count, leave_process_group
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.distributed.jobs import whole_run
from tests.distributed.pool import RanksFailed
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


Event = Callable[[Trainer, int], None]


def slow(*parameters: Any) -> Any:
    """Return parameters that the default suite leaves out."""
    return pytest.param(*parameters, marks=pytest.mark.slow)


class AtStepEnd(TrainerCallback):
    """Calls ``event(trainer, step)`` at the end of each step, before its checkpoint."""

    def __init__(self, trainer: Trainer, event: Event) -> None:
        self.trainer, self.event = trainer, event

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.event(self.trainer, state.global_step)


def train_amid(run_dir: Path, event: Event) -> dict[str, Any]:
    """Train and save the last step, while ``event`` happens; return what came of it."""
    rank, console = rank_from_environment(), io.StringIO()

    def train() -> int | None:
        trainer = assemble(run_dir, load(run_dir), rank, console)
        trainer.callback_handler.callbacks.insert(0, AtStepEnd(trainer, event))
        trainer.train()
        trainer.save_if_not_saved()
        return trainer.saved_step

    with join(load(run_dir), rank):
        saved_step = train()
    return {"said": console.getvalue(), "saved": saved_step, "threads": gloo_worker_count()}


@pytest.fixture
def run_of(tiny_tree: TreeOf, frozen_run: Freeze) -> Callable[..., Path]:
    """Return a function from a strategy and checkpoint keys to a run of 6 steps, saved every 2."""

    def run(strategy: str, dtype: str = "fp32", save_every: int = 2, **checkpoint: Any) -> Path:
        tree = tiny_tree("clm")
        tree["strategy"] = STRATEGIES[strategy]
        tree["precision"] = {"compute_dtype": dtype}
        tree["checkpoint"] = {"keep_last": 3, **checkpoint}
        tree["trainer"] |= {"max_steps": 6, "save_every_steps": save_every}
        world_size = {"single": 1, "fsdp_hybrid": 4}.get(strategy, 2)
        tree["launcher"]["nproc_per_node"] = world_size
        return frozen_run(tree)

    return run


def steps_of(run_dir: Path) -> list[int]:
    return [step for step, _ in layout.whole_checkpoints(run_dir / "checkpoints")]


def assert_every_hash_is_real(checkpoint: Path) -> None:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert files == {
        path.relative_to(checkpoint).as_posix(): {
            "bytes": path.stat().st_size,
            "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes()),
        }
        for path in layout.files_of(checkpoint)
    }


def what_is_in(file: Path) -> Any:
    """Return a file's content in a form that compares bit by bit."""
    if file.name in ("trainer_state.json", ".metadata"):
        return None  # times, and an id that torch draws for each save
    if "states.pt" in file.name:
        # Pickled twice, equal values that were one object may have become two.
        return comparable(torch.load(file, weights_only=False))
    return file.read_bytes()


def comparable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        return value.dtype, value.shape, value.stride(), whole.numpy().tobytes()
    if isinstance(value, dict):
        return [(key, comparable(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value), *map(comparable, value)]
    return comparable(vars(value)) if "LossScaler" in type(value).__name__ else value


# --- in the background ------------------------------------------------------------------------


def save_slowly(trainer: Trainer, step: int) -> None:
    """Hold the write of checkpoint-2 back until two more steps have changed everything."""
    import threading

    from shardwright.train.checkpoint.format.hashed import HashedFolder

    if step == 2:
        sound, go_on = HashedFolder.create, threading.Event()
        trainer.go_on = go_on  # type: ignore[attr-defined]

        def held(folder: HashedFolder, name: str) -> Any:
            if threading.current_thread() is not threading.main_thread():
                assert go_on.wait(60)
            return sound(folder, name)

        HashedFolder.create = held  # type: ignore[method-assign, assignment]
        trainer.undo = lambda: setattr(HashedFolder, "create", sound)  # type: ignore[attr-defined]
    if step == 4:
        assert not steps_of(trainer.run_dir), "the write is still in flight"
        trainer.go_on.set()  # type: ignore[attr-defined]
    if step == 6:
        trainer.undo()  # type: ignore[attr-defined]


def nothing(trainer: Trainer, step: int) -> None:
    pass


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        slow("single", "fp32"),
        ("ddp", "fp32"),
        ("fsdp", "bf16"),
        slow("fsdp_hybrid", "fp32"),
        slow("zero0", "bf16"),
        slow("zero1", "bf16"),
        slow("zero2", "fp32"),
        ("zero2_offload", "bf16"),
        ("zero3", "bf16"),
    ],
)
def test_a_slow_write_beside_training_leaves_the_same_files_as_one_that_stops_it(
    strategy: str, dtype: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    sync, later = run_of(strategy, dtype), run_of(strategy, dtype, **{"async": True})
    world_size = load(sync).launcher.world_size
    ranks(world_size)(train_amid, sync, nothing)
    for result in ranks(world_size)(train_amid, later, save_slowly):
        assert result["saved"] == 6
        if (strategy, dtype) != ("zero1", "bf16"):  # DeepSpeed's BF16_Optimizer keeps its group
            assert result["threads"] == 0
    assert steps_of(sync) == steps_of(later) == [2, 4, 6]

    for step in (2, 4, 6):
        name = f"checkpoints/checkpoint-{step}"
        assert_every_hash_is_real(sync / name)
        assert_every_hash_is_real(later / name)
        one, other = (layout.files_of(run_dir / name) for run_dir in (sync, later))
        assert [p.relative_to(sync) for p in one] == [p.relative_to(later) for p in other]
        for written, written_later in zip(one, other, strict=True):
            assert what_is_in(written) == what_is_in(written_later), written.name


def saved_into_memory(run_dir: Path) -> dict[str, Any]:
    """Train with saves in the background; return what each of them has taken of which memory."""
    import mmap
    from unittest import mock

    from shardwright.train.strategy.state import host_memory

    blocks: list[int] = []
    saves: list[list[tuple[int, int]]] = []
    begin, take = host_memory.HostMemory.begin, host_memory.HostMemory.take

    class Pages(mmap.mmap):
        def __new__(cls, descriptor: int, length: int, **options: Any) -> Any:
            if descriptor == -1:  # memory, and no file
                blocks.append(length)
            return super().__new__(cls, descriptor, length, **options)

    def began(memory: Any, needed_bytes: int, **options: Any) -> None:
        saves.append([])
        begin(memory, needed_bytes, **options)

    def took(memory: Any, wanted_bytes: int) -> Any:
        taken = take(memory, wanted_bytes)
        saves[-1].append((taken.data_ptr(), taken.nbytes()))
        return taken

    with (
        mock.patch.object(host_memory.mmap, "mmap", Pages),
        mock.patch.object(host_memory.HostMemory, "begin", began),
        mock.patch.object(host_memory.HostMemory, "take", took),
    ):
        result = train_amid(run_dir, nothing)
    return {**result, "blocks": blocks, "saves": saves, "page": mmap.PAGESIZE}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_every_save_beside_training_is_copied_into_the_same_memory(
    strategy: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of(strategy, save_every=1, **{"async": True})
    for rank, seen in enumerate(ranks(2)(saved_into_memory, run_dir)):
        assert len(seen["saves"]) >= 5
        first = seen["saves"][0]
        for later in seen["saves"]:
            assert later == first
        # What is allocated in the run: what one save copies, and what fills cache lines and a page.
        state_bytes = sum(size for _, size in first)
        (block,) = seen["blocks"]
        assert state_bytes <= block <= state_bytes + 64 * len(first) + seen["page"]
        # Which is what the rank's files hold, beside what describes it.
        if strategy != "ddp":  # where ranks divide the tensors otherwise at each save
            written = layout.files_of(run_dir / "checkpoints" / "checkpoint-6")
            own = [p for p in written if p.name.startswith((f"__{rank}_", f"zero_pp_rank_{rank}_"))]
            file_bytes = sum(path.stat().st_size for path in own)
            assert file_bytes / 2 < state_bytes <= file_bytes


def note_when_published(trainer: Trainer, step: int) -> None:
    """At the end of step 4, wait until checkpoint-2 is there: no later save has come."""
    import time

    deadline = time.monotonic() + 60
    while step == 4 and not steps_of(trainer.run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_checkpoint_is_published_as_soon_as_it_is_written(
    run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of("ddp", save_every=3, **{"async": True})
    ranks(2)(train_amid, run_dir, note_when_published)
    assert steps_of(run_dir) == [3, 6]


def hold_for_a_second(trainer: Trainer, step: int) -> None:
    import time

    from shardwright.train.loop.saving import saver

    if step == 1:
        sound = saver.write

        def slowly(*arguments: Any) -> Path:
            time.sleep(1)
            return sound(*arguments)

        saver.write = slowly  # type: ignore[assignment]
        trainer.undo = lambda: setattr(saver, "write", sound)  # type: ignore[attr-defined]
    if step == 6:
        trainer.undo()  # type: ignore[attr-defined]


def test_the_next_save_waits_for_the_one_in_flight_and_says_how_long(
    run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of("zero2", save_every=1, **{"async": True})
    first, second = ranks(2)(train_amid, run_dir, hold_for_a_second)
    assert re.search(r"waited [01]\.\d s for checkpoint-1, which was still being", first["said"])
    assert "a larger trainer.save_every_steps leaves more time" in first["said"]
    assert "waited" not in second["said"]
    assert steps_of(run_dir) == [4, 5, 6]


def fail_with_a_write_in_flight(trainer: Trainer, step: int) -> None:
    hold_for_a_second(trainer, step)
    if step == 3:
        trainer.undo()  # type: ignore[attr-defined]
        raise ZeroDivisionError("step 3 fails on all ranks")


def test_a_run_that_fails_still_publishes_what_it_was_writing(
    run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of("fsdp", **{"async": True})
    with pytest.raises(RanksFailed, match="step 3 fails on all ranks"):
        ranks(2)(train_amid, run_dir, fail_with_a_write_in_flight)
    assert steps_of(run_dir) == [2]


def test_a_whole_run_that_saves_in_the_background_ends_with_a_model(
    run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of("zero3", **{"async": True})
    ranks(2)(whole_run, run_dir)
    assert steps_of(run_dir) == [2, 4, 6]
    assert (run_dir / "final" / "model.safetensors").is_file()


# --- disk trouble -----------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], Path]]:
    """Return a function that makes a run's checkpoints/ a file system of 16 MB of its own."""
    mounted: list[Path] = []

    def mount(run_dir: Path) -> Path:
        path = run_dir / "checkpoints"
        path.mkdir()
        if os.geteuid() != 0:
            pytest.skip("mounting a file system needs root")
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a file system is not allowed here")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def remounted(directory: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(directory)], check=True)


def no_space_for_one_save(trainer: Trainer, step: int) -> None:
    trainer.saver.wait()
    ballast = trainer.run_dir / "checkpoints" / "ballast"
    if not trainer.is_world_process_zero():
        return
    if step == 3:
        with ballast.open("wb") as file:
            free = os.statvfs(file.fileno())
            file.write(bytes(free.f_bavail * free.f_bsize - 200_000))
    if step == 5:
        ballast.unlink()


def read_only_for_one_save(trainer: Trainer, step: int) -> None:
    trainer.saver.wait()
    if trainer.is_world_process_zero() and step in (3, 5):
        remounted(trainer.run_dir / "checkpoints", "ro" if step == 3 else "rw")


def gone_for_one_save(trainer: Trainer, step: int) -> None:
    trainer.saver.wait()
    disk = trainer.run_dir / "disk"
    if trainer.is_world_process_zero() and step in (3, 5):
        away = trainer.run_dir / "unplugged"
        (disk if step == 3 else away).rename(away if step == 3 else disk)


LIMIT_BYTES = 12_000


def _limit_file_size(limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


def rank_1_cannot_write(trainer: Trainer, step: int) -> None:
    """Let no file of rank 1 grow beyond a few bytes: its writes fail with EFBIG, its peer's not."""
    trainer.saver.wait()
    if trainer.args.process_index == 1 and step in (3, 5):
        _limit_file_size(LIMIT_BYTES if step == 3 else resource.RLIM_INFINITY)


def rank_1_never_writes_again(trainer: Trainer, step: int) -> None:
    trainer.saver.wait()
    if trainer.args.process_index == 1 and step == 3:
        _limit_file_size(LIMIT_BYTES)


@pytest.fixture
def unlimited(ranks: RanksOf) -> Iterator[None]:
    yield
    ranks(2)(_limit_file_size, resource.RLIM_INFINITY)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (no_space_for_one_save, os.strerror(errno.ENOSPC)),
        (read_only_for_one_save, os.strerror(errno.EROFS)),
    ],
)
def test_a_disk_that_is_full_or_read_only_costs_one_checkpoint_and_no_other(
    event: Event,
    reason: str,
    in_background: bool,
    run_of: Callable[..., Path],
    small_disk: Callable[[Path], Path],
    ranks: RanksOf,
) -> None:
    run_dir = run_of("ddp", **{"async": in_background})
    disk = small_disk(run_dir)
    first, second = ranks(2)(train_amid, run_dir, event)
    assert steps_of(run_dir) == [2, 6]
    assert_every_hash_is_real(disk / "checkpoint-2")
    assert [p.name for p in disk.iterdir() if p.name.startswith(".")] == []
    assert first["said"].count("warning: checkpoint-4 could not be written (rank 0: ") == 1
    assert reason in first["said"]
    assert "training continues, and the next save tries again" in first["said"]
    assert "could not be written" not in second["said"]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(
    "strategy", ["ddp", "zero3", *map(slow, ["fsdp", "zero0", "zero1", "zero2"])]
)
def test_one_rank_that_cannot_write_leaves_the_others_not_waiting(
    strategy: str,
    in_background: bool,
    run_of: Callable[..., Path],
    ranks: RanksOf,
    unlimited: None,
) -> None:
    run_dir = run_of(strategy, **{"async": in_background})
    first, _ = ranks(2)(train_amid, run_dir, rank_1_cannot_write)
    assert steps_of(run_dir) == [2, 6]
    problem = f"checkpoint-4 could not be written (rank 1: {os.strerror(errno.EFBIG)}: {run_dir}"
    assert first["said"].count(problem) == 1
    for step in (2, 6):
        assert_every_hash_is_real(run_dir / f"checkpoints/checkpoint-{step}")
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["checkpoint-2", "checkpoint-6"]


def test_metrics_that_find_no_space_do_not_end_the_run(
    run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of("fsdp", save_every=3)
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    ranks(2)(train_amid, run_dir, nothing)
    assert steps_of(run_dir) == [3, 6]
    assert_every_hash_is_real(run_dir / "checkpoints/checkpoint-6")


@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_is_gone_is_not_replaced_by_what_lies_below(
    in_background: bool, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of("zero2", **{"async": in_background})
    (run_dir / "disk").mkdir()
    (run_dir / "checkpoints").symlink_to("disk")
    first, _ = ranks(2)(train_amid, run_dir, gone_for_one_save)
    assert steps_of(run_dir) == [2, 6]
    assert first["said"].count("warning: checkpoint-4 could not be written") == 1


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_that_is_to_stop_does_so_on_all_ranks(
    in_background: bool, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of("zero3", on_save_error="stop", **{"async": in_background})
    with pytest.raises(RanksFailed) as caught:
        ranks(2)(train_amid, run_dir, rank_1_cannot_write)
    message = str(caught.value)
    assert message.count("SaveFailed: checkpoint-4 could not be written (rank 1: ") == 2
    assert "earlier ones are untouched. checkpoint.on_save_error=stop ends the run;" in message
    assert "set checkpoint.on_save_error=warn to train on until the next save" in message
    assert steps_of(run_dir) == [2]


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("in_background", [False, True])
def test_the_last_save_stops_the_run_where_it_fails(
    in_background: bool, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of("fsdp", **{"async": in_background})
    with pytest.raises(RanksFailed) as caught:
        ranks(2)(train_amid, run_dir, rank_1_never_writes_again)
    message = str(caught.value)
    assert message.count("SaveFailed: checkpoint-6 could not be written (rank 1: ") == 2
    assert "It was the run's last: no later one would try again. Free the disk or fix it" in message
    assert steps_of(run_dir) == [2]


# --- beside DeepSpeed's own save --------------------------------------------------------------


def save_by_deepspeed_too(trainer: Trainer, step: int) -> None:
    if step == 6:
        own = str(trainer.run_dir / "own")
        trainer.model_wrapped.save_checkpoint(own, tag="engine", exclude_frozen_parameters=False)


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [("zero3", "bf16"), slow("zero0", "fp32"), slow("zero1", "bf16"), slow("zero2", "fp32")],
)
def test_the_files_are_those_that_deepspeed_writes_itself(
    strategy: str, dtype: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of(strategy, dtype, save_every=6)
    ranks(2)(train_amid, run_dir, save_by_deepspeed_too)
    ours, own = run_dir / "checkpoints/checkpoint-6", run_dir / "own"
    names = {path.relative_to(own).as_posix() for path in layout.files_of(own)}
    assert {path.relative_to(ours).as_posix() for path in layout.files_of(ours)} == {
        *(names - {"zero_to_fp32.py", "zero_to_torch.py"}),
        *({"engine/parameter_order.json"} if strategy == "zero0" else ()),
        *("rng-0.pt", "rng-1.pt", "scheduler.pt", "trainer_state.json"),
        *("config.json", "generation_config.json"),
    }
    for name in names:
        if not name.endswith(".py"):
            assert what_is_in(ours / name) == what_is_in(own / name), name


# --- a disk for each node ---------------------------------------------------------------------


def write_on_two_nodes(directory: Path) -> list[str]:
    """Write two checkpoints as one of two nodes of a rank each; say what this disk keeps."""
    from shardwright.train.checkpoint import discovery
    from shardwright.train.checkpoint.format.hashed import HashedFolder
    from shardwright.train.loop.saving import save
    from shardwright.train.loop.saving.peers import Peers

    class State:
        def write(self, folder: HashedFolder) -> None:
            folder.write(f"engine/shard-{rank}", b"weights of rank %d" % rank)

        def finish(self, folder: HashedFolder, written: list[Any]) -> None:
            assert len(written) == 1, "what the other node's rank wrote is not on this disk"

    rank = int(os.environ["RANK"])
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    torch.distributed.init_process_group("gloo")
    try:
        peers = Peers(rank, node_local=True)
        disk = directory / f"node-{rank}"
        texts = {"scheduler.pt": b"schedule"} if peers.is_first else {}
        rule = CheckpointConfig(keep_last=1)
        for step in (5, 6):
            written = save.write(
                save.Draft(disk, step, State(), texts, {"step": step}, rule), peers
            )
        assert layout.whole_checkpoints(disk) == [(6, written)]
        assert discovery.newest_whole(disk, gather=from_all) == (written, [])
        return [p.relative_to(written).as_posix() for p in layout.files_of(written)]
    finally:
        del peers
        leave_process_group()


def test_each_node_publishes_what_its_own_ranks_have_written(
    tmp_path: Path, ranks: RanksOf
) -> None:
    assert ranks(2)(write_on_two_nodes, tmp_path) == [
        ["engine/shard-0", "scheduler.pt"],
        ["engine/shard-1", "scheduler.pt"],
    ]


# --- beside the shards ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stage_0_names_the_parameters_in_the_optimizers_order(
    dtype: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run_dir = run_of("zero0", dtype, save_every=6)
    ranks(2)(train_amid, run_dir, nothing)
    checkpoint = run_dir / "checkpoints/checkpoint-6"
    order = json.loads((checkpoint / "engine/parameter_order.json").read_text())
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    shapes = {p["name"]: p["shape"] for p in manifest["parameters"]}
    assert sorted(order) == sorted(shapes)
    state = torch.load(checkpoint / "engine/mp_rank_00_model_states.pt", weights_only=False)
    optimizer = state["optimizer"].get("optimizer_state_dict", state["optimizer"])
    moments = [list(optimizer["state"][i]["exp_avg"].shape) for i in range(len(order))]
    assert moments == [shapes[name] for name in order]
    decayed, spared = (len(group["params"]) for group in optimizer["param_groups"])
    assert all(len(shapes[name]) == 2 for name in order[:decayed])
    assert all(len(shapes[name]) == 1 for name in order[decayed:])
    assert decayed + spared == len(order)
