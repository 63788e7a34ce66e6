"""DeepSpeed on a CPU needs no compiler."""

from typing import Any

import pytest

from shardwright.train.loop.trainer import Trainer
from tests.distributed.jobs import trained
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed


def shared_memory_op(trainer: Trainer) -> Any:
    import deepspeed.comm.comm

    assert trainer.model_wrapped.zero_optimization_stage() == 2
    return deepspeed.comm.comm.cdb.shm_comm_op


def test_no_kernel_is_compiled_for_gloo_ranks(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = {"kind": "zero", "stage": 2}
    tree["trainer"]["max_steps"] = 1
    assert ranks(2)(trained, frozen_run(tree), shared_memory_op) == [None, None]
