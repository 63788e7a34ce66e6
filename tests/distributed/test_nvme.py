"""A run whose weights and optimizer lie on a disk learns, saves and goes on like any other."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardwright.train.checkpoint.read import portable
from tests.distributed.curves import curve
from tests.distributed.interrupted import SAVED, STEPS, STRATEGIES, interrupted
from tests.distributed.jobs import restored_and_saved, whole_run
from tests.distributed.master_weights import masters_that_differ
from tests.fixtures import RanksOf

logger = logging.getLogger("shardwright.train")

pytestmark = [
    pytest.mark.wide,
    pytest.mark.distributed,
    pytest.mark.usefixtures("async_io"),
    pytest.mark.timeout(1500),  # that of a cold compiler
]

Tree = dict[str, Any]


NVME = {
    "kind": "zero",
    "stage": 3,
    "offload_optimizer": "nvme",
    "offload_parameters": "nvme",
    "nvme_buffer_elements": 1_300_000,
}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.mkdir()
    return path


@pytest.fixture
def tree(tiny_tree: Callable[[str], Tree], disk: Path) -> Tree:
    """Return a model of which some sub-groups are large enough for the disk, and some are not."""
    tree = tiny_tree("clm")
    # Odd sizes, so that partitions need padding.
    tree["model"] |= {"vocab_size": 389, "intermediate_size": 40_001, "dropout": 0.0}
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED}
    tree["strategy"] = {**NVME, "nvme_path": str(disk), "sub_group_elements": 600_000}
    return tree


FAST_INIT = {"nvme_fast_init": True, "nvme_optimizer_buffer_count": 5}


@pytest.mark.parametrize(
    ("objective", "fields"), [("clm", {}), ("mlm", FAST_INIT)], ids=["clm", "mlm-fast-init"]
)
def test_two_ranks_learn_what_one_rank_learns(
    objective: str,
    fields: dict[str, Any],
    tiny_tree: Callable[[str], Tree],
    disk: Path,
    frozen_run: Callable[[Tree], Path],
    ranks: RanksOf,
) -> None:
    tree = tiny_tree(objective)
    tree["model"]["intermediate_size"] = 20_000
    in_memory = {"strategy": {"kind": "single"}, "launcher": {**tree["launcher"]}}
    in_memory["launcher"]["nproc_per_node"] = 1
    alone = frozen_run({**tree, **in_memory})
    ranks(1)(whole_run, alone)
    run_dir = frozen_run({**tree, "strategy": {**NVME, "nvme_path": str(disk), **fields}})
    ranks(2)(whole_run, run_dir)
    assert len(curve(run_dir)) == 20
    assert curve(run_dir) == pytest.approx(curve(alone), abs=1e-4)
    assert curve(run_dir, "eval_loss") == pytest.approx(curve(alone, "eval_loss"), abs=1e-4)
    assert curve(run_dir, "grad_norm") == pytest.approx(curve(alone, "grad_norm"), abs=1e-3)
    engine = json.loads((run_dir / "engine.json").read_text())
    assert engine["offload_parameters"] == "nvme"
    assert engine["optimizer_elements_on_nvme"] > 1_000_000
    assert list(disk.iterdir()) == [], "the run left its files behind"


def assert_alike(found: Path, expected: Path) -> None:
    """Compare master weights, moments and step counts of two checkpoints bit for bit."""
    held, written = portable.read(found), portable.read(expected)
    assert held.moments.keys() == written.moments.keys()
    for name in held.moments:
        assert torch.equal(held.weights[name].whole(), written.weights[name].whole()), name
        assert held.scalars[name] == written.scalars[name]
        assert (
            held.moments[name].keys() == written.moments[name].keys() == {"exp_avg", "exp_avg_sq"}
        )
        for kind, tensor in written.moments[name].items():
            assert torch.equal(held.moments[name][kind].whole(), tensor.whole()), f"{name} {kind}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(
    dtype: str,
    tree: Tree,
    frozen_run: Callable[[Tree], Path],
    tmp_path: Path,
    ranks: RanksOf,
) -> None:
    tree["precision"] = {"compute_dtype": dtype}
    source = frozen_run(tree)
    ranks(2)(whole_run, source)
    resumed = interrupted(source, tmp_path / "resumed")
    (said,) = {text for text in ranks(2)(whole_run, resumed) if text}
    assert f"resuming from checkpoint-{SAVED}" in said
    assert curve(resumed) == curve(source)
    last = Path("checkpoints", f"checkpoint-{STEPS}")
    assert_alike(resumed / last, source / last)
    final = load_file(resumed / "final/model.safetensors")
    masters = portable.read(source / last).weights
    for name, tensor in final.items():
        assert torch.equal(tensor, masters[name].whole()), name
    on_disk = json.loads((resumed / "engine.json").read_text())["optimizer_elements_on_nvme"]
    assert 0 < on_disk < sum(tensor.numel() for tensor in final.values()) / 2, "all is, or nothing"


@pytest.mark.parametrize(
    ("before", "after", "world_size"),
    [
        ("nvme", "zero3_offload", 1),
        ("zero2", "nvme", 2),
        pytest.param("nvme", "fsdp", 2, marks=pytest.mark.matrix),
        pytest.param("ddp", "nvme", 1, marks=pytest.mark.matrix),
        pytest.param("fsdp", "nvme", 4, marks=pytest.mark.matrix),
    ],
)
def test_a_run_goes_to_the_disk_and_from_it(
    before: str,
    after: str,
    world_size: int,
    tree: Tree,
    frozen_run: Callable[[Tree], Path],
    tmp_path: Path,
    ranks: RanksOf,
) -> None:
    strategies = {**STRATEGIES, "nvme": tree["strategy"]}
    tree["strategy"] = strategies[before]
    source = frozen_run(tree)
    ranks(2)(whole_run, source)
    changes = {"strategy": strategies[after], "launcher__nproc_per_node": world_size}
    resumed = interrupted(source, tmp_path / "resumed", **changes)
    ranks(world_size)(whole_run, resumed)
    assert curve(resumed) == pytest.approx(curve(source), abs=1e-4)
    untrained = interrupted(source, tmp_path / "untrained", **changes, trainer__max_steps=SAVED)
    ranks(world_size)(restored_and_saved, untrained, tmp_path / "again")
    assert_alike(tmp_path / "again", source / "checkpoints" / f"checkpoint-{SAVED}")


def test_masters_on_the_disk_are_the_initial_values_unrounded(
    tree: Tree, frozen_run: Callable[[Tree], Path], ranks: RanksOf
) -> None:
    tree["precision"] = {"compute_dtype": "bf16"}
    tree["trainer"]["max_steps"] = 1
    assert ranks(2)(masters_that_differ, frozen_run(tree)) == [[], None]


def what_is_logged(run_dir: Path) -> str:
    """Train; return what this rank's log would have."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logger.addHandler(handler)
    try:
        whole_run(run_dir)
    finally:
        logger.removeHandler(handler)
    return text.getvalue()


def test_a_model_too_small_for_the_disk_is_told(
    tiny_tree: Callable[[str], Tree],
    frozen_run: Callable[[Tree], Path],
    disk: Path,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = {**NVME, "nvme_path": str(disk)}
    tree["trainer"]["max_steps"] = 1
    run_dir = frozen_run(tree)
    for text in ranks(2)(what_is_logged, run_dir):
        assert "strategy.offload_optimizer=nvme stores nothing on the disk" in text
    assert json.loads((run_dir / "engine.json").read_text())["optimizer_elements_on_nvme"] == 0


def what_a_refused_read_leaves(path: Path) -> tuple[int, bool]:
    """Return how many reads DeepSpeed says are done, and whether the buffer was left as it was."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = AsyncIOBuilder().load(verbose=False).aio_handle(2**20, 8, False, True, 1)
    buffer = handle.new_cpu_locked_tensor(2**19, torch.zeros(1)).fill_(-1.0)
    written = handle.new_cpu_locked_tensor(2**18, torch.zeros(1)).fill_(7.0)
    handle.async_pwrite(written, str(path), 0)
    handle.wait()
    place = buffer.narrow(0, 1, 2**18)  # four bytes past a page
    handle.async_pread(place, str(path), 0)
    done: int = handle.wait()
    return done, bool((place == -1.0).all())


def test_deepspeed_takes_a_refused_read_for_done(tmp_path: Path, ranks: RanksOf) -> None:
    ((done, is_untouched),) = ranks(1)(what_a_refused_read_leaves, tmp_path / "file")
    if not is_untouched:
        pytest.skip("this disk reads to any address")
    assert done == 1, "DeepSpeed notices failed reads now: swapped.align_gradients may go"
