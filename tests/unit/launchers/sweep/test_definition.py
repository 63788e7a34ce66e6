"""A sweep's own settings, and what is said of wrong ones."""

from __future__ import annotations

import pytest

from shardwright.launchers.sweep import definition
from shardwright.launchers.sweep.definition import Objective
from shardwright.train.errors import UserError


def test_defaults() -> None:
    config = definition.from_tree({})
    assert config.name == "sweep"
    assert config.objectives == (Objective(metric="eval_loss", direction="minimize"),)
    assert (config.search.kind, config.backend, config.seeds) == ("none", "here", None)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"limt": 3}, "unknown key sweep.limt=3: did you mean sweep.limit?"),
        ({"search": {"trails": 3}}, "unknown key sweep.search.trails=3: did you mean sweep.sear"),
        ({"seeds": 0}, "sweep.seeds=0: must be at least 1 or a list, such as [a, b]"),
        ({"seeds": []}, "sweep.seeds=[]: must be a whole number or a list of at least 1"),
        ({"limit": 0}, "sweep.limit=0: must be at least 1"),
        ({"max_parallel": 0}, "sweep.max_parallel=0: must be at least 1 or auto"),
        ({"max_retries": -1}, "sweep.max_retries=-1: must be at least 0"),
        (
            {"objectives": [{"metric": "loss", "direction": "up"}]},
            "objectives.0.direction=up: must be minimize or max",
        ),
        ({"objectives": []}, "sweep.objectives=[]: must be a list of at least 1"),
        ({"backend": "rai"}, "sweep.backend=rai: must be here, ray or wandb"),
        ({"search": {"kind": "tpe"}}, "search.kind=tpe proposes points without end; set sweep.sea"),
        ({"search": {"trials": 3}}, "search.trials=3 is read by a search, and search.kind=none"),
        ({"search": {"seed": 4}}, "search.seed=4 is read by a search"),
        ({"exclude": {"a": 1}}, "sweep.exclude={"),
        ({"grid": [1]}, "sweep.grid=[1]: must be a mapping"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(tree: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        definition.from_tree(tree)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
