"""Another base for a pretrained model's rotary frequencies: written, taken, or refused in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from shardwright.train.config import PretrainedModel
from shardwright.train.config.model import LlamaModel
from shardwright.train.config.positions import rotary_bases
from shardwright.train.errors import UserError
from shardwright.train.model import rotary

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
}


def section(**values: Any) -> PretrainedModel:
    return PretrainedModel(kind="pretrained", name="some/model", **values)


def modernbert() -> ModernBertConfig:
    ids: dict[str, Any] = {
        "bos_token_id": 1,
        "cls_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
    }
    return ModernBertConfig(**SIZES, **ids)


def test_layers_that_attend_to_all_get_their_base_and_the_others_keep_theirs(
    tmp_path: Path,
) -> None:
    asked = section(rope_theta=1_234_567.0, max_position_embeddings=99)
    config = modernbert()
    rotary.extend(config, asked)
    config.save_pretrained(tmp_path)
    written = AutoConfig.from_pretrained(tmp_path)
    assert rotary_bases(written.to_dict()) == {
        "full_attention": 1_234_567.0,
        "sliding_attention": 10_000.0,
    }
    assert written.max_position_embeddings == 99
    model = AutoModelForMaskedLM.from_config(written)
    rotary.check(model, asked)
    assert rotary.read_back(model, asked) == rotary.expected(asked) == {"rope_theta": 1_234_567.0}
    # What another base comes to is read off the frequencies.
    another = section(rope_theta=160_000.0, local_rope_theta=20_000.0)
    assert rotary.read_back(model, another) == {
        "rope_theta": pytest.approx(1_234_567.0, rel=1e-4),
        "local_rope_theta": pytest.approx(10_000.0, rel=1e-4),
    }
    with pytest.raises(UserError, match=r"rope_theta=160000: ModernBertForMaskedLM of model"):
        rotary.check(model, another)


def test_a_base_that_all_layers_share_is_changed() -> None:
    config = LlamaConfig(**SIZES)
    asked = section(rope_theta=500_000.0)
    rotary.extend(config, asked)
    assert rotary_bases(config.to_dict()) == {"full_attention": 500_000.0}
    assert rotary.read_back(LlamaForCausalLM(config), asked) == {"rope_theta": 500_000.0}


def test_nothing_asked_for_changes_nothing() -> None:
    for config in (modernbert(), LlamaConfig(**SIZES), GPT2Config()):
        before = config.to_dict()
        rotary.extend(config, section())
        assert config.to_dict() == before


SCALED = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (
            GPT2Config(),
            {"rope_theta": 1e6, "max_position_embeddings": 2048},
            "model.rope_theta=1e+06 and model.max_position_embeddings=2048: model.name=some/model "
            "(gpt2) has no rotary embeddings by its config",
        ),
        (
            LlamaConfig(**SIZES),
            {"local_rope_theta": 1e6},
            "model.local_rope_theta=1e+06: model.name=some/model (llama) has no layers of "
            "sliding_attention with rotary embeddings of their own",
        ),
        (
            LlamaConfig(**SIZES, rope_parameters=SCALED),
            {"max_position_embeddings": 4096},
            "the rotary embeddings of model.name=some/model (llama) are scaled for its own length "
            "(rope_type=llama3), and would no longer fit; leave it out",
        ),
    ],
)
def test_what_cannot_be_changed_is_refused(
    config: PreTrainedConfig, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        rotary.extend(config, section(**asked))


def test_frequencies_that_are_not_those_asked_for_are_found() -> None:
    def built(base: float) -> PreTrainedModel:
        parameters = {"rope_type": "default", "rope_theta": base}
        return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=parameters))

    sizes = {name: size for name, size in SIZES.items() if name != "pad_token_id"}
    others = {"num_key_value_heads": 2, "max_position_embeddings": 64}
    asked = LlamaModel.model_validate({"kind": "llama", **sizes, **others})
    assert rotary.read_back(built(500_000.0), asked) == rotary.expected(asked)
    assert rotary.read_back(built(499_000.0), asked) == {"rope_theta": pytest.approx(499_000.0)}
    model = built(500_000.0)
    model.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq.bfloat16())
    assert rotary.read_back(model, asked) != rotary.expected(asked)


@pytest.mark.parametrize(
    ("tree", "bases"),
    [
        ({"rope_theta": 10000}, {"full_attention": 10000}),
        (
            {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
            {"full_attention": 160000.0, "sliding_attention": 10000.0},
        ),
        ({"text_config": {"rope_parameters": {"rope_theta": 7.0}}}, {"full_attention": 7.0}),
        ({"rope_parameters": {"full_attention": None, "a": {"rope_theta": 1.0}}}, {"a": 1.0}),
        ({"rope_parameters": "odd", "rope_theta": None}, {}),
        ({}, {}),
    ],
)
def test_a_config_json_of_any_version_tells_its_bases(
    tree: dict[str, Any], bases: dict[str, float]
) -> None:
    assert rotary_bases(tree) == bases
