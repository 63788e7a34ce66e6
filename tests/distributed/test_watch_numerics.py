"""trainer.debug.numerics=watch: the first module that fails is found, under every engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.planted import MODULE, trained_with_a_planted_nan
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
SPOILT = 3


def tree_of(tree: dict[str, Any], engine: str, **debug: Any) -> dict[str, Any]:
    tree["strategy"] = STRATEGIES[engine]
    tree["data"]["eval_fraction"] = 0.0
    tree["trainer"] |= {"max_steps": 5, "save_every_steps": 2, "debug": debug}
    return tree


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_planted_nan_is_found_where_it_is(
    engine: str, direction: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    run_dir = frozen_run(tree_of(tiny_tree("clm"), engine, numerics="watch"))
    found = ranks(2)(trained_with_a_planted_nan, run_dir, MODULE, direction, SPOILT, 1, 2)
    for each in found:
        assert each["step"] == SPOILT
        assert (
            f"first in the {direction} pass of {MODULE} (GPT2MLP), on rank 1, in micro-batch 2 of "
            f"step {SPOILT}: " in each["error"]
        )
    path = run_dir / "diagnosis" / f"numerics-step-{SPOILT}-rank-1.json"
    finding = json.loads(path.read_text())
    assert (finding["module"], finding["phase"]) == (MODULE, direction)
    text = (path.with_suffix(".txt")).read_text()
    assert "forward transformer.h.0.attn.c_attn (Conv1D): output" in text or direction != "forward"
    print(each["error"])
    print(text)
