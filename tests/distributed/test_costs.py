"""What saves, resumes and the export cost each rank, in counts: how they grow with the ranks.

Of files opened, chunks looked at, bytes read, objects sent and received, and plans made. Opening a
checkpoint of hundreds of ranks is in tests/unit/test_many_ranks.py.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from shardwright.train.checkpoint.format import lazy
from shardwright.train.checkpoint.read import dcp
from shardwright.train.config import load
from shardwright.train.export.card import model_card
from shardwright.train.export.final import export
from shardwright.train.loop.saving.save import draft, peers_of, write
from shardwright.train.loop.trainer import Trainer
from shardwright.train.model.blocks import parameter_count
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests import counting
from tests.distributed import wire
from tests.distributed.jobs import trained, whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed

WORLD_SIZES = [2, 4, pytest.param(8, marks=pytest.mark.scale)]
SAVES = 3


@contextmanager
def plans_counted() -> Iterator[Counter[str]]:
    """Count the plans that this rank makes, for itself and for all."""
    made: Counter[str] = Counter()

    def counting_calls(name: str) -> Any:
        sound = getattr(DefaultSavePlanner, name)

        def planned(*arguments: Any) -> Any:
            made[name] += 1
            return sound(*arguments)

        return mock.patch.object(DefaultSavePlanner, name, planned)

    with counting_calls("create_local_plan"), counting_calls("create_global_plan"):
        yield made


def files_in(directory: Path, opened: list[str]) -> int:
    return sum(directory in Path(path).parents for path in opened)


def costs_of_saves(run_dir: Path) -> list[dict[str, int]]:
    """Train, then save as often as SAVES says; return what each save has cost this rank."""
    return trained(run_dir, _costs_of_saves)


def _costs_of_saves(trainer: Trainer) -> list[dict[str, int]]:
    vars(trainer.engine).pop("_plans", None)  # that of the save at the end of the training
    peers, found = peers_of(trainer), []
    for _ in range(SAVES):
        trainer.state.global_step += 1
        with counting.opened() as opened, wire.counted() as sent, plans_counted() as plans:
            write(draft(trainer, peers), peers)
        found.append(
            {
                "files": files_in(trainer.run_dir / "checkpoints", opened),
                "sent": sent.sent,
                "received": sent.received,
                "received_bytes": sent.received_bytes,
                "plans": plans["create_local_plan"],
                "plans_for_all": plans["create_global_plan"],
            }
        )
    return found


@pytest.fixture
def run_of(tiny_tree: TreeOf, frozen_run: Freeze) -> Any:
    """Return a function from ranks, strategy and layers to a run of one step."""

    def run(ranks: int, strategy: str = "fsdp", layers: int = 2) -> Path:
        tree = tiny_tree("clm")
        # Rows that the ranks divide, so that each holds a part of everything.
        tree["model"] |= {"num_hidden_layers": layers, "vocab_size": 384}
        tree["strategy"] = {"kind": strategy}
        tree["trainer"] |= {"max_steps": 1, "save_every_steps": 5, "eval_max_samples": 4}
        tree["trainer"] |= {"micro_batch_size": 16 // ranks}
        tree["checkpoint"] = {"keep_last": 1}
        tree["launcher"]["nproc_per_node"] = ranks
        return frozen_run(tree)

    return run


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_save_plans_once_and_sends_each_object_to_one_rank(
    world_size: int, strategy: str, run_of: Any, ranks: RanksOf
) -> None:
    of_ranks = ranks(world_size)(costs_of_saves, run_of(world_size, strategy))
    for rank, saves in enumerate(of_ranks):
        print(f"{strategy}, rank {rank} of {world_size}: {saves}")
        is_first = rank == 0
        first, *later = saves
        assert (first["plans"], first["plans_for_all"]) == (1, int(is_first))
        for save in later:
            assert (save["plans"], save["plans_for_all"]) == (0, 0)
            # What it has written, and what was wrong with it when it was read back.
            assert save["sent"] == (0 if is_first else 2)
            assert save["received"] == (2 * (world_size - 1) if is_first else 0)
            # Its part and its RNG state, written, flushed and read back.
            assert is_first or save["files"] == later[0]["files"] == of_ranks[1][1]["files"]


def test_what_a_save_sends_does_not_grow_with_parameters_but_in_bytes(
    run_of: Any, ranks: RanksOf
) -> None:
    few, many = (ranks(2)(costs_of_saves, run_of(2, layers=layers)) for layers in (2, 4))
    for rank in range(2):
        for small, large in zip(few[rank], many[rank], strict=True):
            sizes = small.pop("received_bytes"), large.pop("received_bytes")
            assert small == large
            assert sizes[1] <= 2 * sizes[0]


# --- resuming -----------------------------------------------------------------------------------


def costs_of_resuming(run_dir: Path) -> dict[str, int]:
    """Start a run that has no step left; return what this rank has read for it."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _costs_of_resuming(run_dir, rank)


@contextmanager
def reads_counted() -> Iterator[Counter[str]]:
    """Count the chunks that this rank looks at, the shards that it opens and the bytes it reads."""
    found: Counter[str] = Counter(looks=0, bytes=0)
    read_into, describe = lazy._read_into, dcp.describe

    def counted_read(buffer: memoryview, *rest: Any) -> None:
        found["bytes"] += buffer.nbytes
        read_into(buffer, *rest)

    def counted_look(*arguments: Any) -> Any:
        found["looks"] += 1
        return describe(*arguments)

    with (
        mock.patch.object(lazy, "_read_into", counted_read),
        mock.patch.object(dcp, "describe", counted_look),
        counting.opened() as opened,
    ):
        yield found
    found["opened"] = sum(path.endswith(".distcp") for path in opened)


def _costs_of_resuming(run_dir: Path, rank: Any) -> dict[str, int]:
    with reads_counted() as found:
        trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
        trainer.train()
    found["parameters"] = len(list(trainer.model.parameters()))
    found["held"] = sum(part.numel() for part in trainer.engine.local_weights(trainer))
    return dict(found)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_resume_looks_at_what_a_rank_holds_whatever_the_number_of_ranks(
    world_size: int, run_of: Any, ranks: RanksOf
) -> None:
    run_dir = run_of(world_size)
    ranks(world_size)(whole_run, run_dir)
    for rank, cost in enumerate(ranks(world_size)(costs_of_resuming, run_dir)):
        print(f"rank {rank} of {world_size}: {cost}")
        # A weight, two moments and the step of each.
        assert cost["looks"] == 4 * cost["parameters"]
        assert cost["bytes"] == 4 * (3 * cost["held"] + cost["parameters"])
        # Looked at and read; and hashed, of which no rank has more than its share.
        assert cost["opened"] <= 2 * cost["looks"] + 1


# --- the export ---------------------------------------------------------------------------------


def costs_of_the_export(run_dir: Path) -> list[dict[str, int]]:
    """Make final/ out of the newest checkpoint, then of the live engine; return what each read."""
    return trained(run_dir, _costs_of_the_export)


def _costs_of_the_export(trainer: Trainer) -> list[dict[str, int]]:
    assert trainer.resumed is not None
    costs = []
    for checkpoint in (trainer.resumed.checkpoint, None):
        with reads_counted() as found:
            export(trainer, lambda: model_card(trainer, {}), checkpoint)
        found["parameters"] = len(list(trainer.model.parameters()))
        found["elements"] = parameter_count(trainer.model)
        costs.append(dict(found))
    return costs


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_export_looks_at_each_chunk_of_the_weights_once(
    world_size: int, run_of: Any, ranks: RanksOf
) -> None:
    run_dir = run_of(world_size)
    ranks(world_size)(whole_run, run_dir)
    of_ranks = ranks(world_size)(costs_of_the_export, run_dir)
    for rank, costs in enumerate(of_ranks):
        print(f"rank {rank} of {world_size}: {costs}")
    of_checkpoint = [of_checkpoint for of_checkpoint, _ in of_ranks]
    chunks = world_size * of_checkpoint[0]["parameters"]
    # A tensor that two ranks divide between them has a chunk which both read a part of.
    assert chunks <= sum(cost["looks"] for cost in of_checkpoint) < chunks + world_size
    assert sum(cost["bytes"] for cost in of_checkpoint) == 4 * of_checkpoint[0]["elements"]
    assert all(cost["opened"] <= 2 * cost["looks"] + 1 for cost in of_checkpoint)
    assert all((cost["looks"], cost["opened"]) == (0, 0) for _, cost in of_ranks)
