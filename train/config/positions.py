"""How a model that brings its own config.json tells positions apart, and how many it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# Their first token stands at position pad_token_id + 1, so that many positions are never used.
POSITIONS_START_AFTER_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


def usable_positions(model_type: str, positions: int, pad_token_id: int | None) -> int:
    """Return how many of a model's positions tokens can have. Pure."""
    if model_type in POSITIONS_START_AFTER_PADDING:
        return max(0, positions - (1 if pad_token_id is None else pad_token_id) - 1)
    return positions


def longest_sample(config_json: Mapping[str, Any]) -> int | None:
    """Return the tokens that a sample may have, by a config.json; None where that does not say.

    Raises no error: a file that says something odd says nothing. Pure.
    """
    # Models of several parts keep that of their text apart.
    text = config_json.get("text_config")
    section = text if isinstance(text, Mapping) else config_json
    known = (section.get(name) for name in ("max_position_embeddings", "n_positions"))
    positions = next((n for n in known if isinstance(n, int) and n > 0), None)
    if positions is None:
        return None
    pad = section.get("pad_token_id")
    kind = str(section.get("model_type", config_json.get("model_type", "")))
    return usable_positions(kind, positions, pad if isinstance(pad, int) else None) or None


GLOBAL: Final = "full_attention"
LOCAL: Final = "sliding_attention"
"""What transformers calls layers that attend to the whole sequence, and to a window of it."""

_OLDER = {"rope_theta": GLOBAL, "global_rope_theta": GLOBAL, "local_rope_theta": LOCAL}
"""The keys of config.json before transformers 5."""


def rotary_bases(config_json: Mapping[str, Any]) -> dict[str, float]:
    """Return the bases of a model's rotary frequencies by the kind of its layers, by a config.json.

    A model whose layers share one has it as `GLOBAL`; one without rotary embeddings has none. Pure.
    """
    text = config_json.get("text_config")
    section = text if isinstance(text, Mapping) else config_json
    found = {kind: section[name] for name, kind in _OLDER.items() if name in section}
    parameters = section.get("rope_parameters")
    if isinstance(parameters, Mapping):
        nested = {name: p for name, p in parameters.items() if isinstance(p, Mapping)}
        by_kind = nested or {GLOBAL: parameters}
        found |= {kind: p["rope_theta"] for kind, p in by_kind.items() if "rope_theta" in p}
    return {kind: base for kind, base in found.items() if isinstance(base, int | float)}
