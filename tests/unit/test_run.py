"""How long a run is, and what of it is refused before it begins."""

from __future__ import annotations

import io

import pytest

from tests.fixtures import Freeze, TreeOf
from train.config import from_tree, samples_wanted, total_steps
from train.errors import UserError
from train.process.rank import Rank
from train.run import assemble

Tree = TreeOf


@pytest.mark.parametrize(
    ("length", "samples_per_epoch", "steps"),
    [
        ({"max_steps": 7}, 3, 7),
        ({"max_epochs": 1}, 160, 10),
        ({"max_epochs": 1}, 161, 11),
        ({"max_epochs": 2.5}, 160, 25),
        ({"max_epochs": 0.01}, 160, 1),
        ({"max_epochs": 1.1}, 160, 11),  # 1.1 * 160 is 176.00000000000003
        ({"max_tokens": 16 * 32 * 3}, 160, 3),
        ({"max_tokens": 16 * 32 * 3 + 1}, 160, 4),
        ({"max_tokens": 1}, 160, 1),
        ({"max_tokens": 10**13}, 160, 19_531_250_000),
    ],
)
def test_steps_follow_from_steps_epochs_or_tokens(
    length: dict[str, float], samples_per_epoch: int, steps: int, tiny_tree: Tree
) -> None:
    tree = tiny_tree("clm")
    del tree["trainer"]["max_steps"]
    tree["trainer"] |= {"global_batch_size": 16, **length}
    assert tree["data"]["sequence_length"] == 32
    config = from_tree(tree)
    assert total_steps(config.trainer, samples_wanted(config, samples_per_epoch)) == steps


def test_prompts_that_cannot_be_answered_are_refused_before_the_training(
    tiny_tree: Tree, frozen_run: Freeze
) -> None:
    tree = tiny_tree("mlm")
    tree["objective"]["prompts"] = ["import <mask>", "def <mask>(<mask>):"]
    alone = Rank(index=0, local_index=0, world_size=1)
    with pytest.raises(UserError, match="'def <mask>.*' has 2 masks; this model fills exactly one"):
        assemble(frozen_run(tree), alone, io.StringIO())
