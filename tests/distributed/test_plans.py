"""A plan that is kept leaves the very bytes that a new one would."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from shardwright.train.checkpoint.format.hashed import HashedFolder
from shardwright.train.loop.saving.peers import Peers
from shardwright.train.loop.trainer import Trainer
from shardwright.train.strategy.state import plans
from shardwright.train.strategy.state.host_memory import HostMemory
from tests.distributed.jobs import trained
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


def saved_in_turn(run_dir: Path) -> dict[str, Any]:
    """Save with new plans and kept ones, between changes; return what each save left."""
    return trained(run_dir, _saved_in_turn)


def _saved_in_turn(trainer: Trainer) -> dict[str, Any]:
    peers = Peers(trainer.args.process_index)
    planned: list[str] = []
    plan = plans._planned

    def noted(*arguments: Any) -> Any:
        planned.append("planned")
        return plan(*arguments)

    def forget() -> None:
        vars(trainer.engine).pop("_plans", None)

    def save(into: HostMemory | None = None) -> tuple[dict[str, bytes], bool]:
        planned.clear()
        # At one place, as the description says where it is.
        directory = trainer.run_dir / "state"

        def prepare() -> None:
            if peers.is_first:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()

        peers.attempt(prepare)
        folder = HashedFolder(directory)
        state = trainer.engine.save_state(trainer, is_first=peers.is_first, into=into)
        written = peers.collect(lambda: state.write(folder))
        peers.attempt(lambda: state.finish(folder, written) if peers.is_first else None)
        files = sorted((directory / "engine").iterdir())
        found = peers.attempt(lambda: {file.name: file.read_bytes() for file in files})
        return found, bool(planned)

    def change() -> None:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(1)

    with (
        mock.patch.object(plans, "_planned", noted),
        mock.patch.object(filesystem, "_generate_uuid", return_value="one for all"),
    ):
        forget()
        found = {"first": save()}
        change()
        found |= {"kept": save(), "kept copy": save(HostMemory())}
        forget()
        found["anew"] = save()
        if trainer.args.process_index == 1:
            trainer.engine._plans._form = None  # type: ignore[attr-defined]
        found |= {"one differs": save(), "kept again": save()}
        # Nothing but what an optimizer counts, and the dtype of the rest.
        for state in trainer.torch_optimizer().state.values():
            state["exp_avg"] = state["exp_avg"].to(torch.bfloat16)
        found |= {"other dtype": save(), "other dtype, kept": save()}
        forget()
        found["other dtype, anew"] = save()
    return found


@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [("single", 1), ("ddp", 2), ("fsdp", 2), ("fsdp_hybrid", 4)],
)
def test_a_kept_plan_leaves_the_bytes_of_a_new_one(
    strategy: str, world_size: int, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES[strategy]
    tree["trainer"] |= {"max_steps": 1, "eval_max_samples": 4}
    tree["launcher"]["nproc_per_node"] = world_size
    for found in ranks(world_size)(saved_in_turn, frozen_run(tree)):
        is_new = {name: is_planned for name, (_, is_planned) in found.items()}
        assert is_new == {
            **{"first": True, "kept": False, "kept copy": False, "anew": True},
            **{"one differs": world_size > 1, "kept again": False},
            **{"other dtype": True, "other dtype, kept": False, "other dtype, anew": True},
        }
        files = {name: content for name, (content, _) in found.items()}
        assert ".metadata" in files["anew"]
        assert files["first"] != files["anew"], "the weights have changed"
        for name in ("kept", "kept copy", "one differs", "kept again"):
            assert files[name] == files["anew"], name
        assert files["other dtype"][".metadata"] != files["anew"][".metadata"]
        for name in ("other dtype", "other dtype, kept"):
            assert files[name] == files["other dtype, anew"], name
