"""Which modules FSDP2 shards, and gathers, as one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardwright.train.config import FsdpStrategy, RunConfig
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Unit:
    """A module whose parameters are gathered together, ahead of its forward and its backward."""

    module: nn.Module
    is_last: bool = False
    """Whether its backward follows on its forward: freed in between, it would be gathered twice."""
    backward_needs_parameters: bool = True


def units(model: PreTrainedModel, config: RunConfig) -> list[Unit]:
    """Return what to shard as units of their own, inner ones first, without the model.

    Of those that are not within one another the order is that of their use. Raises UserError where
    a policy that should divide the model does not.
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
        return [Unit(module) for module in found]
    blocks = _blocks(model, strategy.block_classes)
    wanted = [Unit(block) for block in blocks]
    # Tied, both are needed from the first to the last: they stay with the model, as do its norms,
    # biases and positions, which are too small to be worth a collective of their own.
    if embedding := _holder(model, model.get_input_embeddings(), blocks):
        wanted.insert(0, Unit(embedding, backward_needs_parameters=not _only_looks_up(embedding)))
    if head := _holder(model, model.get_output_embeddings(), blocks):
        wanted.append(Unit(head, is_last=True))
    return wanted


def _blocks(model: PreTrainedModel, block_classes: Sequence[str]) -> list[nn.Module]:
    if not block_classes:
        from shardwright.train.model.blocks import blocks

        return blocks(model)
    inner_first = [m for m in _inner_first(model) if m is not model]
    classes = Counter(type(m).__name__ for m in inner_first)
    for name in block_classes:
        if name not in classes:
            repeated = sorted(name for name, count in classes.items() if count > 1)
            raise UserError(
                f"strategy.block_class={name} is not a class of modules in this "
                f"model; it repeats {', '.join(repeated)}; choose one, or null to infer it"
            )
    return [m for m in inner_first if type(m).__name__ in block_classes]


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module behind those within it, these in the order in which it has them."""
    seen: set[nn.Module] = set()

    def visit(current: nn.Module) -> Iterator[nn.Module]:
        for child in current.children():
            yield from visit(child)
        if current not in seen:
            seen.add(current)
            yield current

    return visit(module)


def _holder(
    model: nn.Module, module: nn.Module | None, blocks: Sequence[nn.Module]
) -> nn.Module | None:
    """Return the smallest module around one in which all owners of its parameters are.

    None where there is none that holds no block. A head shares its bias with what is around it.
    """
    from torch.nn import ModuleDict, ModuleList

    if module is None or not (owned := set(module.parameters())):
        return None
    found = None
    for candidate in model.modules():  # outer ones first
        within = set(candidate.modules())
        if module not in within or within & set(blocks):
            continue
        outside = (m for m in model.modules() if m not in within)
        is_shared = any(p in owned for m in outside for p in m.parameters(recurse=False))
        if not is_shared and not isinstance(candidate, ModuleList | ModuleDict):
            found = candidate
    return found


def _only_looks_up(module: nn.Module) -> bool:
    """Whether a module's backward is that of an embedding, which needs indices alone."""
    from torch.nn import Embedding

    return isinstance(module, Embedding) and type(module).forward is Embedding.forward


def _big_enough(model: nn.Module, min_parameters: int) -> list[nn.Module]:
    """Return, inner ones first, each module with so many parameters outside of the units within."""
    from torch.nn import ModuleDict, ModuleList

    from shardwright.train.model.blocks import whole_elements

    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    found: list[nn.Module] = []
    elements = whole_elements(model)

    def visit(module: nn.Module) -> set[nn.Parameter]:
        left = set(module.parameters(recurse=False))
        for child in module.children():
            left |= visit(child)
        # Lists have no forward of their own to gather for, and a tied parameter needs a unit that
        # holds all its owners.
        within = set(module.modules())
        can_be = not isinstance(module, ModuleList | ModuleDict) and module is not model
        is_big = sum(elements[p] for p in left) >= min_parameters
        if can_be and is_big and all(owners[p] <= within for p in left):
            found.append(module)
            return set()
        return left

    visit(model)
    return found
