"""From config and model to the one optimizer that every engine steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train.config import RunConfig
from train.errors import UserError

Groups = list[dict[str, Any]]


def build(
    config: RunConfig,
    model: PreTrainedModel,
    decayed: Collection[str],
    adamw: Callable[[Groups, dict[str, Any]], torch.optim.Optimizer],
) -> torch.optim.Optimizer:
    """Return the optimizer of the model's parameters; those named in ``decayed`` decay.

    ``adamw`` makes the engine's own of groups and settings.

    Raises UserError where trainer.muon_learning_rate_scale=original meets a model whose matrices
    are stored as input x output, where torchao is not installed for adamw_8bit, and where
    DeepSpeed's CPU Adam cannot be compiled.
    """
    trainer = config.trainer
    if trainer.optimizer == "muon":
        return _muon(config, model, decayed)
    groups = _groups(dict(model.named_parameters()), decayed, trainer.weight_decay)
    if trainer.optimizer == "adafactor":
        return torch.optim.Adafactor(
            groups,
            lr=trainer.learning_rate,
            beta2_decay=trainer.adafactor_beta2_decay,
            eps=(trainer.adafactor_epsilon1, trainer.adafactor_epsilon2),
            d=trainer.adafactor_clip_threshold,
        )
    if trainer.optimizer == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UserError(
                "trainer.optimizer=adamw_8bit needs the package torchao, which is not installed; "
                "`pip install torchao`"
            ) from None
        # torchao compiles its step. torch 2.13 finds compiled code of an earlier process by what
        # does not tell the ranks' local shapes apart (torch/_functorch/_aot_autograd/
        # autograd_cache.py): under FSDP the second run on a machine learned something else.
        torch._functorch.config.enable_autograd_cache = False
        return AdamW8bit(groups, **_adamw_settings(config))
    return adamw(groups, _adamw_settings(config))


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
    that parameters may be sharded DTensors: the momentum is sharded as they are, and each update
    is gathered for the Newton-Schulz iteration, which needs the whole matrix, one at a time.
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
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._muon_step(parameter, group)
        # Loading a state replaces both, so the part that steps them takes them anew.
        self._adamw.param_groups = [g for g in self.param_groups if g["algorithm"] == "adamw"]
        self._adamw.state = self.state
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        return loss

    def _muon_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        direction = _zeropower_via_newtonschulz(
            whole, group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        if isinstance(update, DTensor):
            mesh = update.device_mesh
            replicated = DTensor.from_local(
                direction, mesh, [Replicate()] * mesh.ndim, run_check=False
            )
            direction = replicated.redistribute(placements=update.placements)  # keeps its part
        rate = float(group["lr"])
        scaled_rate = _adjust_lr(rate, group["adjust_lr_fn"], parameter.shape)
        if self.found_inf is None:
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.add_(direction, alpha=-scaled_rate)
            return
        old, direction = _local(parameter), _local(direction)
        new = old.mul(1 - rate * group["weight_decay"]).add_(direction, alpha=-scaled_rate)
        old.copy_(torch.where(self.found_inf.bool(), old, new))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _muon(config: RunConfig, model: PreTrainedModel, decayed: Collection[str]) -> MuonWithAdamW:
    trainer = config.trainer
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    if transposed and trainer.muon_learning_rate_scale == "original":
        raise UserError(
            f"trainer.muon_learning_rate_scale=original needs matrices of output x input, but "
            f"{type(model).__name__} stores them the other way round; "
            "set trainer.muon_learning_rate_scale=match_rms_adamw"
        )
    matrices = hidden_matrices(model)
    named = dict(model.named_parameters())
    hidden = {name: p for name, p in named.items() if name in matrices}
    rest = {name: p for name, p in named.items() if name not in matrices}
    return MuonWithAdamW(
        torch.optim.AdamW(
            _groups(rest, decayed, trainer.weight_decay), fused=True, **_adamw_settings(config)
        ),
        torch.optim.Muon(
            _groups(hidden, decayed, trainer.weight_decay),
            lr=trainer.muon_learning_rate or trainer.learning_rate,
            momentum=trainer.muon_momentum,
            ns_steps=trainer.muon_newton_schulz_steps,
            adjust_lr_fn=trainer.muon_learning_rate_scale,
        ),
    )


def _groups(
    parameters: dict[str, nn.Parameter], decayed: Collection[str], weight_decay: float
) -> Groups:
    """Return one group that decays and one that does not, without those that are empty."""
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    groups: Groups = [
        {"params": [p for n, p in trained.items() if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in trained.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw_settings(config: RunConfig) -> dict[str, Any]:
    trainer = config.trainer
    return {
        "lr": trainer.learning_rate,
        "betas": (trainer.adam_beta1, trainer.adam_beta2),
        "eps": trainer.adam_epsilon,
    }
