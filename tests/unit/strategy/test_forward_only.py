"""What there is of an engine where weights are only read: weights, and nothing for an optimizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shardwright.train.errors import UserError
from shardwright.train.strategy import engine_of, loop_facts, verify
from shardwright.train.strategy.zero import forward_only
from tests.strategies import STRATEGIES
from tests.unit.strategy.configs import config
from tests.unit.trees import PURE

BF16 = {"compute_dtype": "bf16"}


@pytest.mark.parametrize(
    ("strategy", "precision", "engine", "dtype"),
    [
        ("ddp", BF16, "none", "float32"),  # autocast's operands
        ("ddp", PURE, "none", "bfloat16"),
        ("zero0", BF16, "none", "bfloat16"),
        ("zero2_offload", BF16, "none", "bfloat16"),
        ("zero3", BF16, "DeepSpeedEngine", "bfloat16"),
        ("fsdp", BF16, "FSDP2", "bfloat16"),
        ("fsdp", {}, "FSDP2", "float32"),
    ],
)
def test_weights_are_held_as_forward_passes_take_them(
    strategy: str, precision: dict[str, Any], engine: str, dtype: str
) -> None:
    asked = config(strategy=STRATEGIES[strategy], precision=precision)
    facts = engine_of(asked, 2).expected_forward_only()
    assert facts["engine"] == engine
    assert facts.get("parameter_dtypes", facts.get("master_dtypes")) == [dtype]


def test_no_place_is_kept_for_an_optimizer_and_parameters_stay_offloaded() -> None:
    asked = config(strategy=STRATEGIES["zero3_offload"], precision=BF16)
    strategy = forward_only.without_optimizer(asked).strategy
    assert (strategy.offload_optimizer, strategy.offload_parameters) == ("none", "cpu")  # type: ignore[union-attr]
    facts = engine_of(asked, 2).expected_forward_only()
    assert facts["offload_parameters"] == "cpu"
    assert "offload_optimizer" not in facts


@pytest.mark.parametrize("stage", [0, 2])
def test_what_only_a_trainings_engine_casts_is_refused(stage: int) -> None:
    extra = {"data_types": {"keep_in_fp32_modules": ["norm"]}}
    strategy = {"kind": "zero", "stage": stage, "extra": extra}
    engine = engine_of(config(strategy=strategy, precision=BF16), 1)
    message = r"strategy\.extra\.data_types=\{'keep_in_fp32_modules': \['norm'\]\} .* evaluate with"
    with pytest.raises(UserError, match=message):
        engine.place(nn.Linear(1, 1), {})  # type: ignore[arg-type]
    forward_only.check(config(strategy={**strategy, "stage": 3}).strategy)  # type: ignore[arg-type]


def test_other_weights_than_asked_for_are_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("expected_of_model", "read_back_of_model"):
        monkeypatch.setattr(loop_facts, name, lambda _: {"fused_loss": True})
    engine = engine_of(config(strategy=STRATEGIES["zero2"], precision=BF16), 2)
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    trainer: Any = SimpleNamespace(model=model, model_wrapped=model)
    assert verify.verify_forward_only(engine, trainer)["parameter_dtypes"] == ["bfloat16"]
    model.float()
    with pytest.raises(verify.EngineMismatch, match=r"evaluated\nparameter_dtypes: .*'float32'"):
        verify.verify_forward_only(engine, trainer)
