"""Which modules FSDP2 shards, and gathers, as one."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from shardwright.train.config import FsdpStrategy, RunConfig
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def units(model: PreTrainedModel, config: RunConfig) -> list[nn.Module]:
    """Return the modules to shard as units of their own, inner ones first, without the model.

    Raises UserError where a policy that should divide the model does not.
    """
    strategy = config.strategy
    assert isinstance(strategy, FsdpStrategy)
    if strategy.wrap == "none":
        return []
    if strategy.wrap == "size":
        found = _big_enough(model, strategy.min_unit_parameters)
        if not found:
            raise UserError(
                "strategy.wrap=size finds no module of "
                f"strategy.min_unit_parameters={strategy.min_unit_parameters:,} parameters below "
                "the whole model, which would be gathered as one; lower it, or set "
                "strategy.wrap=none"
            )
        return found
    if strategy.block_class is None:
        from shardwright.train.model.blocks import blocks

        return blocks(model)
    found = [m for m in model.modules() if type(m).__name__ == strategy.block_class]
    if not found or found == [model]:
        classes = Counter(type(m).__name__ for m in model.modules())
        repeated = sorted(name for name, count in classes.items() if count > 1)
        raise UserError(
            f"strategy.block_class={strategy.block_class} is not a class of modules in this "
            f"model; it repeats {', '.join(repeated)}; choose one, or null to infer it"
        )
    return found


def _big_enough(model: nn.Module, min_parameters: int) -> list[nn.Module]:
    """Return, inner ones first, each module with so many parameters outside of the units within."""
    from torch.nn import ModuleDict, ModuleList

    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> set[nn.Parameter]:
        left = set(module.parameters(recurse=False))
        for child in module.children():
            left |= visit(child)
        # Lists have no forward of their own to gather for, and a tied parameter needs a unit that
        # holds all its owners.
        within = set(module.modules())
        can_be = not isinstance(module, ModuleList | ModuleDict) and module is not model
        is_big = sum(p.numel() for p in left) >= min_parameters
        if can_be and is_big and all(owners[p] <= within for p in left):
            found.append(module)
            return set()
        return left

    visit(model)
    return found
