"""The loss scaling is read off the scaler that runs, torch's or DeepSpeed's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from shardwright.train.strategy.loss_scale import keep_beside_gradients, loss_scaling
from shardwright.train.strategy.zero import facts

FACTS = {"initial_loss_scale": 4096.0, "loss_scale_growth_steps": 7}


def test_torch() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=7)
    assert loss_scaling(scaler) == FACTS


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", enabled=False)])
def test_losses_that_are_not_scaled(scaler: torch.amp.GradScaler | None) -> None:
    assert set(loss_scaling(scaler).values()) == {None}


@pytest.mark.parametrize("stage_0", [True, False])
def test_deepspeed(stage_0: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, LossScaleConfig
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    section = DeepSpeedFP16Config(enabled=True, initial_scale_power=12, loss_scale_window=7)
    scaling = {"static_loss_scale": 0, "dynamic_loss_args": section.dynamic_loss_scale_args()}
    if stage_0:
        config = LossScaleConfig(torch.float16, dynamic_loss_scale=True, **scaling)
        optimizer = SimpleNamespace(loss_scale_config=config)
    else:
        scaler = CreateLossScaler(torch.float16, dynamic_scaling=True, **scaling)
        optimizer = SimpleNamespace(loss_scaler=scaler)
    assert facts.loss_scaling(optimizer) == FACTS


@pytest.mark.parametrize("is_kept", [True, False])
def test_the_scale_lies_where_offloaded_gradients_are(is_kept: bool) -> None:
    scaler, host = torch.amp.GradScaler("cpu", init_scale=8.0), torch.device("cpu")
    if is_kept:
        keep_beside_gradients(scaler, host)
    # On a device of its own, as a GPU is.
    assert scaler.scale(torch.ones((), device="meta")).device.type == "meta"
    scale = scaler._get_scale_async()
    assert scale is not None
    assert scale.device.type == ("cpu" if is_kept else "meta"), "torch keeps it elsewhere now"
    if is_kept:
        assert scaler.get_scale() == 8.0
    keep_beside_gradients(None, host)
