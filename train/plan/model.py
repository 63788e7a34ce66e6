"""A run's model without values, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shardwright.train.config import FsdpStrategy, RunConfig
from shardwright.train.loop.trainer import Trainer
from shardwright.train.model import build as models
from shardwright.train.model import fp8
from shardwright.train.model.blocks import blocks_or_none
from shardwright.train.model.flops import flops_per_token
from shardwright.train.optimizer.muon import hidden_matrices
from shardwright.train.plan.facts import ModelFacts, Packed, Parameter
from shardwright.train.plan.packed import packed_sizes
from shardwright.train.strategy.fsdp.units import units


def planned(config: RunConfig) -> PreTrainedModel:
    """Return the run's model with its parameters on the meta device; no weights are read.

    Raises UserError where there is no such model, or its config is not to be had here.
    """
    model, _ = models.build(config, stand_in(), reads_weights=False)
    return model


def stand_in() -> PreTrainedTokenizerFast:
    """Return a tokenizer that has special tokens and no others.

    A run's own may have to be trained first; of what a model takes from it nothing has to do with
    memory or time.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    begin, pad, end, unknown, mask = names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    words = WordLevel({name: index for index, name in enumerate(names)}, unk_token=unknown)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words),
        bos_token=begin,
        cls_token=begin,
        pad_token=pad,
        eos_token=end,
        sep_token=end,
        unk_token=unknown,
        mask_token=mask,
    )


def facts_of(model: PreTrainedModel, config: RunConfig) -> ModelFacts:
    """Return what a run's model is made of."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    hidden, packed = hidden_matrices(model), packed_sizes(model, config)
    parameters = tuple(
        Parameter(
            name,
            tuple(parameter.shape),
            name in decayed,
            name in hidden,
            parameter.requires_grad,
            packed.get(name),
        )
        for name, parameter in model.named_parameters()
    )
    own = (
        sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )
    has_blocks = bool(blocks_or_none(model))
    in_fp8 = [layer for layer in fp8.linear_layers(model) if fp8.fits(layer)] if has_blocks else []
    by_any_name = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    found = _units(model, config)
    all_train = all(parameter.trains for parameter in parameters)
    return ModelFacts(
        parameters,
        max(own),
        tuple(sum(p.numel() for p in unit) for unit in found),
        None
        if all_train
        else tuple(sum(p.numel() for p in unit if p.requires_grad) for unit in found),
        packed_units=_packed_units(model, packed, found),
        fp8_elements=sum(layer.weight.numel() for layer in in_fp8),
        repeated_elements=by_any_name - sum(parameter.elements for parameter in parameters),
        flops_per_token=flops_per_token(model, config),
    )


def _packed_units(
    model: PreTrainedModel, packed: Mapping[str, Packed], found: list[list[nn.Parameter]]
) -> tuple[tuple[int, int], ...]:
    if not packed:
        return ()
    sizes = {p: packed[name] for name, p in model.named_parameters() if name in packed}
    of_each = [[(p.numel(), sizes[p].codes) for p in unit if p in sizes] for unit in found]
    return tuple((sum(e for e, _ in each), sum(c for _, c in each)) for each in of_each)


def _units(model: PreTrainedModel, config: RunConfig) -> list[list[nn.Parameter]]:
    """Return the parameters of each unit: those of the run's strategy, or of FSDP's usual ones."""
    if not isinstance(config.strategy, FsdpStrategy):
        config = config.model_copy(update={"strategy": FsdpStrategy(kind="fsdp")})
    if not blocks_or_none(model):
        return []
    taken: set[int] = set()
    found = []
    for unit in units(model, config):
        own = [p for p in unit.module.parameters() if id(p) not in taken]
        taken |= set(map(id, own))
        found.append(own)
    return found
