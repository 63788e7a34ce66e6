"""Configs and tokenizers in files that transformers 4 reads as well as the version that wrote them.

Version 5 renamed what it writes: 4.57 stops at the class of its tokenizers, and passes over the
bases of its rotary positions, so that a Llama of another base is read without a word as one of
10,000.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train.durable import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_TOKENIZER_CONFIG = "tokenizer_config.json"
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Tokenizer classes by their name in version 5; it knows the older names still."""


def config_text(config: PreTrainedConfig) -> str:
    """Return a model's config.json."""
    tree = json.loads(config.to_json_string())
    return json.dumps({**tree, **older_fields(tree)}, indent=2, sort_keys=True) + "\n"


def older_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return what version 4 reads, of a config as version 5 writes it. Pure.

    Source: 4.57.3, models/llama/configuration_llama.py and modernbert/configuration_modernbert.py.
    """
    rotary = tree.get("rope_parameters") or {}
    if "rope_theta" in rotary:
        found = {"rope_theta": rotary["rope_theta"]}
        if rotary.get("rope_type", "default") != "default":
            found["rope_scaling"] = {k: v for k, v in rotary.items() if k != "rope_theta"}
        return found
    if tree.get("model_type") != "modernbert":
        return {}
    every = [i for i, kind in enumerate(tree["layer_types"]) if kind == "full_attention"]
    return {
        "global_attn_every_n_layers": every[1] if len(every) > 1 else len(tree["layer_types"]),
        "global_rope_theta": rotary["full_attention"]["rope_theta"],
        "local_rope_theta": rotary["sliding_attention"]["rope_theta"],
    }


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save a tokenizer in a directory; one of byte pairs with vocab.json and merges.txt as well."""
    tokenizer.save_pretrained(directory)
    path = directory / _TOKENIZER_CONFIG
    if path.is_file():
        tree = json.loads(path.read_text(encoding="utf-8"))
        if (older := _CLASSES.get(tree.get("tokenizer_class"))) is not None:
            tree["tokenizer_class"] = older
            write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and type(backend.model).__name__ == "BPE":
        backend.model.save(str(directory))
