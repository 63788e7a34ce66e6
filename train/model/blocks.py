"""The repeated blocks of a model, and how many parameters it has."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from shardwright.train.errors import UserError


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters: tied ones once, packed and partitioned ones whole."""
    return sum(whole_elements(model).values())


def whole_elements(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return how many elements each parameter has, be it packed or divided among ranks."""
    from shardwright.train.model.quantised import layers

    packed = {
        layer.weight: layer.in_features * layer.out_features for layer in layers(model).values()
    }
    # ZeRO-3 leaves an empty tensor in place and the whole size in ds_numel.
    return {p: packed.get(p, getattr(p, "ds_numel", p.numel())) for p in model.parameters()}


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated transformer blocks in order: the units to shard, compile and recompute.

    They are the biggest `ModuleList` (by modules within) whose members are all of one class, among
    the classes that the model names as not to be split where it names any. Of an encoder-decoder
    they are those of the encoder, then of the decoder. Raises UserError where there is none.
    """
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len({type(member) for member in module}) == 1
        and not isinstance(module[0], nn.ModuleList)
    ]
    unsplit = set(model._no_split_modules or ())
    # `fully_shard` puts a class of another name before a module's own.
    named = [
        members
        for members in lists
        if unsplit & {each.__name__ for each in type(members[0]).__mro__}
    ]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no list of equal transformer blocks to shard or compile; "
            "choose another strategy than fsdp and trainer.compile=false, or another model"
        )
    if model.config.is_encoder_decoder and named:
        return [block for members in named for block in members]
    return max(named or lists, key=lambda members: sum(1 for m in members for _ in m.modules()))


def blocks_or_none(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks as `blocks` does; an empty list where there is none."""
    try:
        return blocks(model)
    except UserError:
        return []


def check_blocks_are_not_skipped(model: PreTrainedModel, ranks: int) -> None:
    """Raise UserError where a model skips whole blocks at random and several ranks train it.

    Each rank draws for itself, and one that skips a block is missing in the collectives of those
    that do not.
    """
    shares = [getattr(module, "layerdrop", None) for module in model.modules()]
    share = max((s for s in shares if isinstance(s, float | int)), default=0)
    if ranks > 1 and share > 0:
        raise UserError(
            f"this {model.config.model_type} skips whole blocks at random (layerdrop={share:g} in "
            f"its config.json), and {ranks} ranks would wait for each other's; set what names "
            "layerdrop in its config.json to 0, or train it on one rank"
        )
