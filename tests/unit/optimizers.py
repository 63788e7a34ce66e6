"""Optimizers of tiny models, ready to step."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from shardwright.train.config import RunConfig, from_tree
from shardwright.train.optimizer.build import build
from shardwright.train.strategy import engine_of
from tests.unit.trees import TREE


def gpt2(tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = GPT2Config(
        vocab_size=64, n_embd=16, n_inner=32, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    return GPT2LMHeadModel(sizes)


def config(**trainer: Any) -> RunConfig:
    return from_tree({**TREE, "trainer": {**TREE["trainer"], **trainer}})


def decayed(model: PreTrainedModel) -> set[str]:
    """Return what the Trainer lets decay."""
    return set(transformers.Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]


def built(model: PreTrainedModel, **trainer: Any) -> torch.optim.Optimizer:
    settings = config(**trainer)
    return build(settings, model, decayed(model), engine_of(settings).adamw)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
