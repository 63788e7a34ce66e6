"""What an optimizer's step holds for a while is what a plan takes it to hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.plan.temporaries import temporaries
from shardwright.train.optimizer.muon import MuonWithAdamW
from shardwright.train.plan.facts import ModelFacts, Parameter
from shardwright.train.plan.live import LiveBytes
from tests.unit.launchers.composed import composed

SHAPES = ((2000, 256), (256, 256), (256, 256), (256,))
Parameters = list[torch.nn.Parameter]


def most_alive(build: Callable[[Parameters], torch.optim.Optimizer]) -> int:
    """Return the bytes that a second step has besides weights, gradients and state."""
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = build(parameters)
    optimizer.step()
    live = LiveBytes()
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    live.leave_out([*parameters, *(p.grad for p in parameters if p.grad is not None), *state])
    with live:
        live.begin()
        optimizer.step()
    return live.peak


def muon(parameters: Parameters) -> torch.optim.Optimizer:
    of_adamw = [parameters[0], parameters[3]]
    return MuonWithAdamW(torch.optim.AdamW(of_adamw, fused=True), torch.optim.Muon(parameters[1:3]))


def planned(optimizer: str, device: str) -> int:
    _, run = composed("model=gpt2_tiny", "strategy=single", f"trainer.optimizer={optimizer}")
    config = resolve(run, Machine(cores=2), "/runs/a")
    launcher = config.launcher.model_copy(update={"device": device})
    model = ModelFacts(
        tuple(
            Parameter(str(number), shape, len(shape) > 1, number in (1, 2))
            for number, shape in enumerate(SHAPES)
        ),
        2000 * 256,
    )
    return temporaries(config.model_copy(update={"launcher": launcher}), model)


@pytest.mark.parametrize(
    ("optimizer", "device", "build"),
    [
        ("adamw", "cpu", lambda parameters: torch.optim.AdamW(parameters, fused=True)),
        ("adafactor", "cpu", lambda parameters: torch.optim.Adafactor(parameters, foreach=False)),
        # What torch takes by default on a GPU.
        ("adafactor", "cuda", lambda parameters: torch.optim.Adafactor(parameters, foreach=True)),
        ("muon", "cpu", muon),
    ],
)
def test_a_step_takes_what_is_planned(
    optimizer: str, device: str, build: Callable[[Parameters], torch.optim.Optimizer]
) -> None:
    measured = most_alive(build)
    assert planned(optimizer, device) == pytest.approx(measured, rel=0.02, abs=1000)
