"""Generation settings that transformers saves and loads without a word, out of anyone's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.utils import logging as of_transformers

FILE = "generation_config.json"

# They decide which of the others may be there, and so come first.
_MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache", "cache_implementation")


def accepted(settings: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return settings without those that transformers refuses, and the refused ones.

    Published files often hold what it ignores (a temperature beside ``do_sample: false``) or does
    not even load (``max_new_tokens: 0``). It warns of the former and raises for both where they are
    saved after a token id has changed, as ids do that follow the tokenizer (transformers 5.23,
    `GenerationConfig.save_pretrained`). Without them `generate` does what it does with them.
    """
    kept: dict[str, Any] = {}
    refused: dict[str, Any] = {}
    with _quiet():
        for key in sorted(settings, key=lambda key: key not in _MODES):
            if _is_valid({**kept, key: settings[key]}):
                kept[key] = settings[key]
            else:
                refused[key] = settings[key]
        # Where both are set, `generate` takes the former and warns at each call.
        if kept.get("max_new_tokens") is not None and kept.get("max_length") is not None:
            refused["max_length"] = kept.pop("max_length")
        return GenerationConfig(**kept), refused


def read(path: Path) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return what of a generation_config.json is accepted, and what is not. Raises ValueError."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not map settings to values")
    return accepted(settings)


def left_out(refused: Mapping[str, Any], name: str) -> str:
    """Return what to tell a user of refused settings. Pure."""
    values = ", ".join(f"{key}={value!r}" for key, value in refused.items())
    return (
        f"warning: {FILE} of {name} sets {values}, which transformers refuses or ignores beside "
        "its other settings; the run's own file leaves them out"
    )


def _is_valid(settings: Mapping[str, Any]) -> bool:
    try:
        config = GenerationConfig(**settings)
        config.validate(strict=True)
        config.to_json_string()
    except Exception:  # whatever values of another type or form lead to
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    level = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        of_transformers.set_verbosity(level)


def generation_config(config: PreTrainedConfig) -> GenerationConfig:
    text = config.get_text_config()
    starts = getattr(config, "decoder_start_token_id", None)
    return GenerationConfig(
        bos_token_id=getattr(text, "bos_token_id", None),
        **({} if starts is None else {"decoder_start_token_id": starts}),
        eos_token_id=text.eos_token_id,
        pad_token_id=text.eos_token_id if text.pad_token_id is None else text.pad_token_id,
        # Learned positions end here; the pipelines' default length may lie beyond.
        max_length=getattr(text, "max_position_embeddings", None),
        use_cache=True,
    )
