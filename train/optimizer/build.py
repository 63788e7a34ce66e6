"""From config and model to the one optimizer that every engine steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train.config import RunConfig
from train.errors import UserError
from train.optimizer.groups import Groups, adamw_settings, groups_of
from train.optimizer.muon import MuonWithAdamW, hidden_matrices


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
    groups = groups_of(dict(model.named_parameters()), decayed, trainer.weight_decay)
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
        return AdamW8bit(groups, **adamw_settings(config))
    return adamw(groups, adamw_settings(config))


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
            groups_of(rest, decayed, trainer.weight_decay), fused=True, **adamw_settings(config)
        ),
        torch.optim.Muon(
            groups_of(hidden, decayed, trainer.weight_decay),
            lr=trainer.muon_learning_rate or trainer.learning_rate,
            momentum=trainer.muon_momentum,
            ns_steps=trainer.muon_newton_schulz_steps,
            adjust_lr_fn=trainer.muon_learning_rate_scale,
        ),
    )
