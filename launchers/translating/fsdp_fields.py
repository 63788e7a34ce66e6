"""Fields of accelerate's FSDP plugin, under either of their names, become a strategy. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwright.launchers.translating.translation import Translation
from shardwright.train.config.elsewhere import accelerate_launch
from shardwright.train.config.elsewhere.fsdp_plugin import FSDP_PLUGIN

_SHARDING = {
    **dict.fromkeys(("full_shard", "1"), "fsdp"),
    **dict.fromkeys(("shard_grad_op", "2"), "fsdp_grad_op"),
    **dict.fromkeys(("no_shard", "3"), "ddp"),
    **dict.fromkeys(("hybrid_shard", "4"), "fsdp_hybrid"),
    **dict.fromkeys(("hybrid_shard_zero2", "5"), "fsdp_hybrid_grad_op"),
}
_WRAP = {
    "transformer_based_wrap": "transformer",
    "size_based_wrap": "size",
    "no_wrap": "none",
}


def sharding(fields: Mapping[str, Any]) -> str | None:
    """Return the option that the fields ask for; None where they do not say a known one."""
    for name in ("fsdp_sharding_strategy", "sharding_strategy"):
        if name in fields:
            return _SHARDING.get(str(fields[name]).lower())
    return None


def translate(found: Translation, fields: Mapping[str, Any], prefix: str = "") -> None:
    """Note what becomes of each field; of a name with fsdp_ in front, and of one without."""
    if sharding(fields) == "ddp":
        for key, value in fields.items():
            found.ignores(f"{prefix}{key}", value, "nothing is sharded under strategy=ddp")
        return
    is_one_unit = any(
        str(fields.get(name)).lower() == "no_wrap"
        for name in ("fsdp_auto_wrap_policy", "auto_wrap_policy")
    )
    for key, value in fields.items():
        if is_one_unit and key.endswith("prefetch"):
            found.ignores(f"{prefix}{key}", value, "one unit has none to be gathered ahead")
            continue
        _field(found, f"{prefix}{key}", key.removeprefix("fsdp_"), value)


def _field(found: Translation, path: str, name: str, value: Any) -> None:
    text = str(value).lower()
    reshards = name == "reshard_after_forward" and text not in ("true", "false")
    if name == "sharding_strategy" or reshards:
        option = _SHARDING.get(text)
        if option is None:
            found.refuses(path, value, f"there are {', '.join(k for k in _SHARDING if len(k) > 1)}")
        else:
            found.sets(path, value, f"strategy={option}")
    elif name == "reshard_after_forward":
        found.sets(path, value, strategy__reshard_after_forward=text == "true")
    elif name in ("offload_params", "cpu_offload"):
        if text == "true":
            found.sets(path, value, strategy__offload=True)
        else:
            found.ignores(path, value, "off")
    elif name == "auto_wrap_policy":
        if text in _WRAP:
            found.sets(path, value, strategy__wrap=_WRAP[text])
        else:
            found.refuses(path, value, f"there are {', '.join(_WRAP)}")
    elif name in ("transformer_layer_cls_to_wrap", "transformer_cls_names_to_wrap"):
        _blocks(found, path, value)
    elif name == "min_num_params":
        if value:
            found.sets(path, value, "strategy.wrap=size", strategy__min_unit_parameters=int(value))
        else:
            found.ignores(path, value, "off")
    elif name in ("backward_prefetch", "forward_prefetch", "limit_all_gathers"):
        _prefetch(found, path, name, text, value)
    elif name == "activation_checkpointing" and text == "true":
        found.sets(path, value, trainer__checkpoint_activations_every_blocks=1)
    elif name == "activation_checkpointing_offload" and text == "true":
        found.sets(path, value, trainer__offload_activations=True)
    elif name == "version" and str(value) in ("1", "2"):
        found.ignores(path, value, "it is FSDP2")
    else:
        row = FSDP_PLUGIN.get(name) or accelerate_launch.row(f"fsdp_{name}")
        found.by_row(path, value, row, "accelerate documents no such field")


def _blocks(found: Translation, path: str, value: Any) -> None:
    names = value if isinstance(value, list) else [n.strip() for n in str(value).split(",")]
    if len([name for name in names if name]) == 1 and names[0] not in ("None", "null"):
        found.sets(path, value, strategy__block_class=names[0])
    elif value in (None, "", "None"):
        found.ignores(path, value, "a model's blocks are found by themselves")
    else:
        found.refuses(path, value, "strategy.block_class is one class; leave it out to find blocks")


def _prefetch(found: Translation, path: str, name: str, text: str, value: Any) -> None:
    if name == "backward_prefetch" and text in ("no_prefetch", "none"):
        found.sets(path, value, strategy__prefetch_units=0)
    elif name == "backward_prefetch" and text in ("backward_pre", "backward_post"):
        found.ignores(path, value, "one unit is gathered ahead by default, strategy.prefetch_units")
    else:
        found.ignores(path, value, "strategy.prefetch_units holds for forward and backward alike")
