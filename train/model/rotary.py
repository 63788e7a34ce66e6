"""Rotary embeddings: give a pretrained model other bases, and read those of a live one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from shardwright.train.config import ModelConfig, PretrainedModel
from shardwright.train.config.positions import GLOBAL, LOCAL
from shardwright.train.errors import UserError

_FREQUENCIES = re.compile(r"(?:(?P<kind>.+)_)?inv_freq")
"""What transformers calls the buffers; one for each kind of layer where they differ."""


def extend(config: PreTrainedConfig, model: PretrainedModel) -> None:
    """Write into a pretrained model's config what the section changes of it: bases and positions.

    Raises UserError where it has no rotary embedding, or not one of that kind.
    """
    bases = {GLOBAL: model.rope_theta, LOCAL: model.local_rope_theta}
    asked = [f"model.{_FIELDS[kind]}={base:g}" for kind, base in bases.items() if base is not None]
    positions = model.max_position_embeddings
    if positions is not None:
        asked.append(f"model.max_position_embeddings={positions}")
    if not asked:
        return
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    what = f"model.name={model.name} ({text.model_type})"
    if not parameters:
        raise UserError(
            f"{' and '.join(asked)}: {what} has no rotary embeddings by its config, and how it "
            f"tells positions apart cannot be changed; leave {_out(asked)}, or choose another model"
        )
    by_kind = {kind: p for kind, p in parameters.items() if isinstance(p, dict)}
    shared = not by_kind
    by_kind = by_kind or {GLOBAL: parameters}
    scaled = {p.get("rope_type", "default") for p in by_kind.values()} - {"default"}
    if scaled:
        raise UserError(
            f"{' and '.join(asked)}: the rotary embeddings of {what} are scaled for its own length "
            f"(rope_type={', '.join(sorted(scaled))}), and would no longer fit; leave "
            f"{_out(asked)}, or choose another model"
        )
    for kind, base in bases.items():
        if base is not None and kind not in by_kind:
            others = ", ".join(sorted(by_kind)) if not shared else "one kind alone"
            raise UserError(
                f"model.{_FIELDS[kind]}={base:g}: {what} has no layers of {kind} with rotary "
                f"embeddings of their own (it has {others}); leave it out"
            )
    changed = {
        kind: {**p, "rope_theta": p["rope_theta"] if (new := bases.get(kind)) is None else new}
        for kind, p in by_kind.items()
    }
    text.rope_parameters = changed[GLOBAL] if shared else {**parameters, **changed}
    if positions is not None:
        text.max_position_embeddings = positions


_FIELDS = {GLOBAL: "rope_theta", LOCAL: "local_rope_theta"}


def _out(asked: list[str]) -> str:
    return "it out" if len(asked) == 1 else "them out"


def expected(model: ModelConfig) -> dict[str, Any]:
    """Return the bases that a section asks for, by its fields, as `read_back` must find them."""
    return {name: base for name in _FIELDS.values() if (base := _asked(model, name)) is not None}


def read_back(model: PreTrainedModel, section: ModelConfig) -> dict[str, Any]:
    """Return the bases of a live model's rotary frequencies where its section asks for some.

    Where a small ModernBERT has layers of one kind alone, the other has what was asked for.
    """
    found = dict(_frequencies(model))
    facts: dict[str, Any] = {}
    for kind, name in _FIELDS.items():
        if (asked := _asked(section, name)) is None:
            continue
        if kind in found:
            facts[name] = _base_of(found[kind], asked)
        elif found and not isinstance(section, PretrainedModel):
            facts[name] = asked
    return facts


def check(model: PreTrainedModel, section: PretrainedModel) -> None:
    """Raise UserError where a pretrained model's own code has not taken the bases asked for."""
    wanted, live = expected(section), read_back(model, section)
    for name, base in wanted.items():
        if live.get(name) != base:
            has = f"has {live[name]:g}" if name in live else "has no such frequencies"
            raise UserError(
                f"model.{name}={base:g}: {type(model).__name__} of model.name={section.name} does "
                f"not take it from its config, and {has}; leave it out, or choose another model"
            )


def _asked(section: ModelConfig, field: str) -> float | None:
    base: float | None = getattr(section, field, None)
    return base


def _frequencies(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the frequencies of each kind of layers."""
    for name, buffer in model.named_buffers():
        match = _FREQUENCIES.fullmatch(name.rpartition(".")[2])
        if match and not (match["kind"] or "").endswith("original"):
            yield match["kind"] or GLOBAL, buffer


def _base_of(frequencies: torch.Tensor, asked: float) -> float:
    """Return the base b of the frequencies b ** (-i / n), i in [0, n): that asked for, if it is."""
    found = frequencies.detach().double().cpu()
    count = len(found)
    exponents = torch.arange(count, dtype=torch.float64) / count
    if torch.allclose(found, asked**-exponents, rtol=1e-4, atol=0.0):
        return asked
    return float(f"{float(found[-1]) ** (-count / max(count - 1, 1)):.6g}")
