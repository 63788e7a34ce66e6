"""Keys of a model's config.json that a run gives other values: which there are, and their types."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig

from shardwright.train.checkpoint.format.damage import in_one_line
from shardwright.train.config import NamedModel
from shardwright.train.config.section import shown
from shardwright.train.errors import UserError


def overridden(config: PreTrainedConfig, model: NamedModel, kept: Path | None) -> PreTrainedConfig:
    """Return the config of the same class with ``model.overrides``, made anew of its config.json.

    Made anew, because classes derive values that no key holds. Raises UserError where a key is
    unknown, a value is of another type, or the architecture does not take what they come to.
    """
    if not model.overrides:
        return config
    revision = None if kept else model.revision
    tree, _ = PreTrainedConfig.get_config_dict(kept or model.name, revision=revision)
    kind = type(config)
    changed = _merged(kind, config, tree, model.overrides, "model.overrides")
    _fit_layers(kind, tree, changed, model.overrides)
    try:
        made = kind.from_dict(changed)
    except StrictDataclassFieldValidationError as error:
        raise UserError(_wrong_type(error, model)) from None
    except Exception as error:  # each architecture raises what it likes
        raise UserError(
            f"model.overrides={shown(model.overrides)}: {kind.__name__} does not take these values "
            f"({_reason(error)}); correct them"
        ) from None
    made.name_or_path = config.name_or_path
    return made


def _merged(
    kind: type[PreTrainedConfig],
    config: PreTrainedConfig,
    tree: Mapping[str, Any],
    overrides: Mapping[str, Any],
    prefix: str,
) -> dict[str, Any]:
    """Return a config's keys, under the names that its class has for them, with other values."""
    aliases = kind.attribute_map
    changed = {aliases.get(key, key): value for key, value in tree.items()}
    given: dict[str, str] = {}
    for key, value in overrides.items():
        name = aliases.get(key, key)
        if name in given:
            raise UserError(
                f"{prefix}.{given[name]} and {prefix}.{key} are one key of {kind.__name__}; leave "
                "one of them out"
            )
        given[name] = key
        known = _known(kind, config, tree)
        if name not in known:
            raise UserError(_unknown(kind, key, known, prefix))
        now = getattr(config, name, None)
        if isinstance(now, PreTrainedConfig) and isinstance(value, dict):
            inner = changed.get(name)
            inner = inner if isinstance(inner, dict) else now.to_dict()
            changed[name] = _merged(type(now), now, inner, value, f"{prefix}.{key}")
            continue
        _check_type(f"{prefix}.{key}", value, now)
        changed[name] = value
    return changed


_OF_EVERY_CONFIG = frozenset(PreTrainedConfig.__dataclass_fields__)
"""Of transformers' base class: settings of heads and outputs, none of an architecture."""


def _known(
    kind: type[PreTrainedConfig], config: PreTrainedConfig, tree: Mapping[str, Any]
) -> set[str]:
    """Return the keys that an architecture has: of its class, and of the config.json itself."""
    fields = set(getattr(kind, "__dataclass_fields__", ()))
    fields |= set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs"}
    fields |= {kind.attribute_map.get(key, key) for key in tree}
    fields |= {name for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    return {name for name in fields - _OF_EVERY_CONFIG if not name.startswith("_")}


def _unknown(kind: type[PreTrainedConfig], key: str, known: set[str], prefix: str) -> str:
    names = sorted((known | set(kind.attribute_map)) - set(NamedModel.decided_elsewhere))
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(names)}"
    return f"unknown key {prefix}.{key}: {kind.__name__} has no such key; {hint}"


def _check_type(key: str, value: Any, now: Any) -> None:
    """Raise UserError where a value is of another type than the one it replaces.

    Classes of transformers' own check the types that they declare; those of others may not.
    """
    if value is None or now is None:
        return
    allowed: tuple[type, ...] = (type(now),)
    if isinstance(now, float) or (isinstance(now, int) and not isinstance(now, bool)):
        allowed = (int, float)
    if isinstance(now, list | tuple):
        allowed = (list, tuple)
    if isinstance(now, str | bool | int | float | list | tuple | dict) and (
        not isinstance(value, allowed) or isinstance(value, bool) is not isinstance(now, bool)
    ):
        raise UserError(f"{key}={shown(value)}: must be {_in_words(now)}, as {shown(now)} is")


def _in_words(now: Any) -> str:
    for kinds, words in (
        ((bool,), "true or false"),
        ((int, float), "a number"),
        ((str,), "text"),
        ((list, tuple), "a list"),
    ):
        if isinstance(now, kinds):
            return words
    return "a mapping"


def _wrong_type(error: StrictDataclassFieldValidationError, model: NamedModel) -> str:
    field = str(error).partition("'")[2].partition("'")[0]
    reason = _reason(error)
    if field in model.overrides:
        return f"model.overrides.{field}={shown(model.overrides[field])}: {reason}"
    return f"model.overrides={shown(model.overrides)}: {field}: {reason}"


def _reason(error: Exception) -> str:
    """Return what a check has found; huggingface_hub wraps it in an error of its own."""
    cause = error.__cause__
    return in_one_line(cause if isinstance(cause, Exception) else error)


def _fit_layers(
    kind: type[PreTrainedConfig],
    tree: Mapping[str, Any],
    changed: dict[str, Any],
    overrides: Mapping[str, Any],
) -> None:
    """Shorten what a config.json lists layer by layer, where there are to be fewer layers."""
    name = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    before, after = tree.get(name), changed.get(name)
    if not isinstance(before, int) or not isinstance(after, int) or before == after:
        return
    for key, value in list(changed.items()):
        if not isinstance(value, list) or len(value) != before or key in overrides:
            continue
        if "layer" not in key:
            continue
        if after > before:
            raise UserError(
                f"model.overrides.{name}={after}: the config lists {key} for each of its {before} "
                f"layers; give model.overrides.{key} as well, a list of {after}"
            )
        changed[key] = value[:after]


def shape_changes(
    shapes: Mapping[str, Sequence[int]], others: Mapping[str, Sequence[int]]
) -> str | None:
    """Say how parameters of one model differ from those of another; None where none does. Pure."""
    for name in sorted({*shapes, *others}):
        before, after = shapes.get(name), others.get(name)
        if before != after:
            count = sum(shapes.get(n) != others.get(n) for n in {*shapes, *others})
            now = "is gone" if after is None else f"is {list(after)}"
            was = "not there before" if before is None else f"{list(before)} in the weights"
            return f"{count} parameter(s) would be others: {name} {now}, {was}"
    return None
