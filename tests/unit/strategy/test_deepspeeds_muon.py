"""Why DeepSpeed's Muon is not taken: what it clips are its updates."""

from __future__ import annotations

import inspect

import pytest

from tests.unit.optimizers import config


def test_it_takes_the_norm_after_it_has_made_updates_of_gradients() -> None:
    from deepspeed.runtime.zero import stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(stage3)
    step = source[source.index("def step(self") :]
    assert step.index("_apply_muon_to_accumulated_grads()") < step.index("_get_norm_groups()")
    # At stages 1 and 2 where the gradients are put into the partition, of which the step takes the
    # norm.
    assert "muon_update(" in inspect.getsource(DeepSpeedZeroOptimizer.get_flat_partition)


def test_the_error_says_so() -> None:
    with pytest.raises(ValueError, match="DeepSpeed's own 0.19.8 clips and logs the norm of the"):
        config_under_zero()


def config_under_zero() -> None:
    from shardwright.train.config import from_tree
    from tests.unit.trees import TREE

    assert config(optimizer="muon").trainer.optimizer == "muon"
    trainer = {**TREE["trainer"], "optimizer": "muon"}
    from_tree({**TREE, "trainer": trainer, "strategy": {"kind": "zero", "stage": 2}})
