"""Generation settings are saved and loaded without a word, whatever was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from shardwright.train.model.generation import accepted, left_out

SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": False}


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {}),
        # The order in which a file has them says nothing.
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {}),
        (SAMPLING, {k: v for k, v in SAMPLING.items() if k != "do_sample"}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"num_return_sequences": 2}, {"num_return_sequences": 2}),
        ({"num_return_sequences": 2, "num_beams": 4}, {}),
        ({"max_new_tokens": 0}, {"max_new_tokens": 0}),
        ({"max_new_tokens": 20, "max_length": 50}, {"max_length": 50}),
        ({"early_stopping": "soon"}, {"early_stopping": "soon"}),
        ({"early_stopping": [1]}, {"early_stopping": [1]}),
        ({"cache_implementation": "none of them"}, {"cache_implementation": "none of them"}),
        ({"watermarking_config": 3}, {"watermarking_config": 3}),
        ({"validate": 5}, {"validate": 5}),
        ({"pad_token_id": -1}, {"pad_token_id": -1}),
        ({"length_penalty": 2.0}, {"length_penalty": 2.0}),
    ],
)
def test_what_transformers_refuses_is_left_out(
    settings: dict[str, Any], refused: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"eos_token_id": 2, **settings}
    config, found = accepted(settings)
    assert found == refused
    # Token ids follow the tokenizer, and a file that was changed is saved by strict rules.
    config.eos_token_id = [7, 2]
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    kept = {key: value for key, value in settings.items() if key not in refused}
    assert {key: getattr(again, key) for key in kept} == {**kept, "eos_token_id": [7, 2]}


def test_transformers_refuses_to_save_what_it_has_loaded_once_an_id_has_changed(
    tmp_path: Path,
) -> None:
    """The reason for all this, transformers 5.23."""
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    config = GenerationConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "unchanged")
    config.eos_token_id = 7
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        config.save_pretrained(tmp_path / "changed")


def test_a_user_is_told_which() -> None:
    assert left_out({"temperature": 0.6, "top_k": 3}, "org/base") == (
        "warning: generation_config.json of org/base sets temperature=0.6, top_k=3, which "
        "transformers refuses or ignores beside its other settings; the run's own file leaves "
        "them out"
    )
