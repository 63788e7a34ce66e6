"""Which option of conf/ a run's model and strategy are, told from their values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_CONF = Path(__file__).resolve().parents[2] / "conf"
_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "intermediate_size",
)
"""What makes a model the one of its preset; dropout, vocabulary and the like may be others."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def model_name(section: Mapping[str, Any]) -> str:
    """Return the preset whose sizes a model has; of others what they are, such as gpt2-2x32."""
    kind = section["kind"]
    if "name" in section:
        return Path(str(section["name"])).name
    of_its_sizes = {
        name: option
        for name, option in options("model").items()
        if option.get("kind") == kind and all(option.get(key) == section.get(key) for key in _SIZES)
    }
    if of_its_sizes:
        return _nearest(section, of_its_sizes)
    return f"{kind}-{section.get('num_hidden_layers')}x{section.get('hidden_size')}"


def strategy_name(section: Mapping[str, Any]) -> str:
    """Return the option that a strategy differs least from, in what tells such options apart."""
    kind = section["kind"]
    of_its_kind = {n: o for n, o in options("strategy").items() if o.get("kind") == kind}
    return _nearest(section, of_its_kind) if of_its_kind else str(kind)


def _nearest(section: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> str:
    telling = [
        key
        for key in dict.fromkeys(key for option in known.values() for key in option)
        if len({repr(option.get(key)) for option in known.values()}) > 1
    ]

    def differences(name: str) -> int:
        return sum(_differs(known[name].get(key), section.get(key)) for key in telling)

    return min(known, key=differences)


def _differs(of_the_option: Any, found: Any) -> bool:
    """Whether a value is another than its option's; one that has to be given is any but null."""
    return found is None if of_the_option == "???" else found != of_the_option


@cache
def options(group: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the options of a group, with what each takes over from others of it."""
    found = {path.stem: path for path in sorted((_CONF / group).glob("*.yaml"))}
    trees = {name: yaml.load(path.read_text(), _LOADER) or {} for name, path in found.items()}

    def whole(name: str) -> dict[str, Any]:
        tree = dict(trees[name])
        inherited: dict[str, Any] = {}
        for entry in tree.pop("defaults", ()):
            if isinstance(entry, str) and entry in trees:
                inherited |= whole(entry)
        return inherited | tree

    return {name: whole(name) for name in trees}
