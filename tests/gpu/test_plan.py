"""What a plan says of a run on a GPU is what that run takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.plan import of_run
from shardwright.train.config import load
from shardwright.train.run_directory.plan import differences
from tests.distributed.jobs import whole_run
from tests.distributed.pool import Ranks
from tests.fixtures import Freeze, TreeOf

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1026,
    "vocab_size": 16_384,
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "zero2": {"kind": "zero", "stage": 2},
    "zero2_offload": {"kind": "zero", "stage": 2, "offload_optimizer": "cpu"},
    "fsdp": {"kind": "fsdp"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_peak_and_step_are_what_was_planned(
    strategy: str,
    objective: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    rank_on: Callable[[str], Ranks],
    skip_where_lacking: Callable[..., None],
) -> None:
    tree = tiny_tree(objective)
    tree["model"] |= SIZES
    tree["strategy"] = STRATEGIES[strategy]
    tree["precision"] = {"compute_dtype": "bf16"}
    tree["data"]["sequence_length"] = 1024
    tree["launcher"] |= {"device": "cuda", "nproc_per_node": 1}
    batch = {"global_batch_size": 8, "micro_batch_size": 4, "eval_max_samples": 1}
    # Compiled code keeps less than what was traced.
    tree["trainer"] |= {"max_steps": 20, "compile": False, **batch}
    run_dir: Path = frozen_run(tree)
    skip_where_lacking("cuda", load(run_dir).precision)

    rank_on("cuda")(whole_run, run_dir)

    starts, problem = of_run.starts(run_dir)
    assert problem is None
    missed = {each.name: each.missed for each in differences(starts[-1])}
    assert missed["peak_bytes"] == pytest.approx(0, abs=0.05)
    assert missed["optimizer_bytes"] == pytest.approx(0, abs=0.02)
    if "step_seconds" in missed:  # of a GPU that conf/hardware/ knows
        assert missed["step_seconds"] == pytest.approx(0, abs=0.15)
