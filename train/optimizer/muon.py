"""Muon for hidden matrices, with AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardwright.train.config import RunConfig, TrainerConfig
from shardwright.train.errors import UserError
from shardwright.train.optimizer import adamw as adamw_part
from shardwright.train.optimizer import dealing
from shardwright.train.optimizer.groups import groups_of
from shardwright.train.optimizer.kind import AdamwOf, Algorithm, Kind


def hidden_matrices(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that Muon is for: matrices between hidden layers.

    Embeddings of every kind and the output head are none, as its authors advise
    (https://kellerjordan.github.io/posts/muon/).
    """
    head = model.get_output_embeddings()
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and id(parameter) not in looked_up | of_head
    }


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for some groups and its fused AdamW for the others, as one optimizer.

    A group's ``algorithm``, "muon" or "adamw", says which. What differs from `torch.optim.Muon` is
    that parameters may be sharded DTensors: the momentum is sharded as they are. And that each
    matrix is orthogonalised by one rank, for the Newton-Schulz iteration needs all of it, while
    others have theirs at work; where all ranks hold all of them, too.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon: torch.optim.Muon) -> None:
        self._adamw = adamw
        self.found_inf: Tensor | None = None
        """1 where a step must change no weight, else 0, on the device, as AdamW has it."""
        for algorithm, part in (("adamw", adamw), ("muon", muon)):
            for group in part.param_groups:
                group["algorithm"] = algorithm
        # AdamW's first: its learning rate is the one that is logged.
        super().__init__([*adamw.param_groups, *muon.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon_step()
        # Loading a state replaces both, so the part that steps them takes them anew.
        self._adamw.param_groups = [g for g in self.param_groups if g["algorithm"] == "adamw"]
        self._adamw.state = self.state
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        return loss

    def _muon_step(self) -> None:
        matrices = [
            (parameter, group)
            for group in self.param_groups
            if group["algorithm"] == "muon"
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not matrices:
            return
        for parameter, group in matrices:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])

        def update(number: int) -> Tensor:
            parameter, group = matrices[number]
            momentum = _local(self.state[parameter]["momentum_buffer"])
            found = momentum
            if group["nesterov"]:
                found = _local(parameter.grad).lerp(momentum, group["momentum"])
            return found.bfloat16()  # as the iteration begins: half the bytes, the same bits

        def orthogonalised(number: int, whole: Tensor) -> Tensor:
            _, group = matrices[number]
            return _zeropower_via_newtonschulz(
                whole, group["ns_coefficients"], group["ns_steps"], group["eps"]
            )

        for number, direction in dealing.worked_on(
            [(p.shape[0], p.shape[1]) for p, _ in matrices],
            update,
            orthogonalised,
            dealing.Holders.of(matrices[0][0]),
            like=_local(matrices[0][0]).new_empty(0, dtype=torch.bfloat16),
        ):
            self._apply(*matrices[number], direction)

    def _apply(self, parameter: Tensor, group: dict[str, Any], direction: Tensor) -> None:
        """Move this rank's part of a matrix by its part of the direction."""
        rate = float(group["lr"])
        scaled_rate = _adjust_lr(rate, group["adjust_lr_fn"], parameter.shape)
        old = _local(parameter)
        if self.found_inf is None:
            old.mul_(1 - rate * group["weight_decay"])
            old.add_(direction, alpha=-scaled_rate)
            return
        new = old.mul(1 - rate * group["weight_decay"]).add_(direction, alpha=-scaled_rate)
        old.copy_(torch.where(self.found_inf.bool(), old, new))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settings(trainer: TrainerConfig) -> dict[str, Any]:
    return {
        "lr": trainer.muon_learning_rate or trainer.learning_rate,
        "momentum": trainer.muon_momentum,
        "nesterov": True,
        "ns_steps": trainer.muon_newton_schulz_steps,
        "adjust_lr_fn": trainer.muon_learning_rate_scale,
    }


def _build(
    config: RunConfig, model: PreTrainedModel, decayed: Collection[str], adamw: AdamwOf
) -> torch.optim.Optimizer:
    trainer = config.trainer
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    if transposed and trainer.muon_learning_rate_scale == "original":
        raise UserError(
            f"trainer.muon_learning_rate_scale=original needs matrices of output x input, but "
            f"{type(model).__name__} stores them the other way round; "
            "set trainer.muon_learning_rate_scale=match_rms_adamw"
        )
    matrices = hidden_matrices(model)
    rest = {name for name, _ in model.named_parameters()} - matrices
    return MuonWithAdamW(
        torch.optim.AdamW(
            groups_of(model, decayed, trainer, names=rest),
            fused=True,
            **adamw_part.settings(trainer),
        ),
        torch.optim.Muon(groups_of(model, decayed, trainer, names=matrices), **settings(trainer)),
    )


_NAMES = {
    "lr": "peak_learning_rate",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "ns_steps": "newton_schulz_steps",
    "adjust_lr_fn": "learning_rate_scale",
}
KIND = Kind(
    "MuonWithAdamW",
    {"muon": Algorithm(settings, _NAMES), "adamw": adamw_part.ADAMW},
    _build,
)
