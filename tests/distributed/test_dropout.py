"""Each rank draws its dropout from a stream of its own, which a run can draw again."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.config import load
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.distributed.interrupted import SAVED, STEPS, interrupted
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


def masks_of(run_dir: Path) -> list[str]:
    """Train; return what the dropout of the embeddings kept, by micro-batch and in this order."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _watch(run_dir, rank)


def _watch(run_dir: Path, rank: Rank) -> list[str]:
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    seen: list[str] = []

    def watch(module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            seen.append(hashlib.sha1(output.ne(0).numpy().tobytes()).hexdigest())

    dropout: Any = trainer.model.transformer.drop  # type: ignore[union-attr]
    dropout.register_forward_hook(watch)
    trainer.train()
    return seen


def dropout_tree(tree: dict[str, Any], strategy: str) -> dict[str, Any]:
    """Return the tree of a run whose samples are of one length, and whose masks have their shape.

    Two micro-batches of each rank are a step.
    """
    tree["model"]["dropout"] = 0.5
    tree["strategy"] = STRATEGIES[strategy]
    tree["data"]["eval_fraction"] = 0.0
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED, "micro_batch_size": 4}
    return tree


def world_of(strategy: str) -> int:
    return {"single": 1, "fsdp_hybrid": 4}.get(strategy, 2)


@pytest.fixture(scope="module")
def of_ddp() -> dict[int, list[list[str]]]:
    """Return the masks of ranks under ddp by their number, filled in by the test that needs them.

    A rank alone under single draws those of the first of several.
    """
    return {}


@pytest.mark.parametrize(
    "strategy",
    [
        *("single", "zero3", "fsdp"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("zero0", "zero2", "zero3_offload", "fsdp_hybrid")
        ),
    ],
)
def test_every_rank_and_every_pass_of_a_fresh_run_drops_something_else(
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    of_ddp: dict[int, list[list[str]]],
) -> None:
    def drawn(strategy: str, world_size: int) -> list[list[str]]:
        tree = dropout_tree(tiny_tree("clm"), strategy)
        tree["launcher"]["nproc_per_node"] = world_size
        return ranks(world_size)(masks_of, frozen_run(tree))

    world_size = world_of(strategy)
    found = drawn(strategy, world_size)
    passes = 16 // 4 // world_size * STEPS
    assert [len(of_rank) for of_rank in found] == [passes] * world_size
    assert len({mask for of_rank in found for mask in of_rank}) == passes * world_size
    # Which engine it is makes no difference.
    if world_size > 1:
        if world_size not in of_ddp:
            of_ddp[world_size] = drawn("ddp", world_size)
        assert found == of_ddp[world_size]


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_a_resume_draws_on_where_as_many_ranks_are_and_anew_where_others_are(
    strategy: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf, tmp_path: Path
) -> None:
    source = frozen_run(dropout_tree(tiny_tree("clm"), strategy))
    whole = ranks(2)(masks_of, source)
    known = {mask for of_rank in whole for mask in of_rank}

    resumed = ranks(2)(masks_of, interrupted(source, tmp_path / "resumed"))
    assert resumed == [of_rank[-len(of_rank) // 2 :] for of_rank in whole]

    launcher = {"kind": "torchrun", "device": "cpu", "nproc_per_node": 4}
    wider = ranks(4)(masks_of, interrupted(source, tmp_path / "wider", launcher=launcher))
    anew = [mask for of_rank in wider for mask in of_rank]
    assert len(anew) == len(set(anew)) == 4 * (STEPS - SAVED)
    assert not known & set(anew)
